"""Harbor's task folders (schema 1.x): an instruction, an environment, a verifier that writes a reward.

task.toml  instruction.md  environment/  tests/test.sh  solution/solve.sh
"""

from __future__ import annotations

import re
import tomllib
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from k2rl.errors import ConfigError
from k2rl.types import prepare
from sandboxes.base import GIB, MIB

DEEPEST = 6
"""Levels below the given folder at which tasks are looked for."""


class HarborTask(msgspec.Struct, frozen=True):
    """What of a task folder decides an episode; its files are read when they are needed."""

    id: str
    folder: str
    instruction: str
    #: Seconds: of the whole episode, and of the verifier.
    agent_s: float = 600.0
    verifier_s: float = 600.0
    verifier_env: dict[str, str] = {}
    memory_bytes: int = 2 * GIB
    disk_bytes: int = GIB
    #: An image that the docker daemon has, in place of one made from environment/Dockerfile.
    image: str = ""
    tags: tuple[str, ...] = ()

    def files(self, part: str) -> dict[str, bytes]:
        """The files of one of its folders: `environment`, `tests` or `solution`."""
        folder = Path(self.folder) / part
        inside = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in inside}

    @property
    def needs_image(self) -> bool:
        return bool(self.image) or (Path(self.folder) / "environment" / "Dockerfile").is_file()


def load_harbor(source: str | None) -> list[HarborTask]:
    """The tasks in a folder, or in folders below it, by path; None: our own small set.

    Raises:
        ConfigError: one line: no such folder, no task in it, a task that is wrong or that cannot be had here.
    """
    root = (
        Path(str(files("envs.coding") / "data" / "harbor")) if source is None else Path(source).expanduser()
    )
    if not root.is_dir():
        raise ConfigError(f"tasks={source!r}: there is no such folder")
    root = root.resolve()
    found = sorted(path.parent for path in _configs(root))
    if not found:
        raise ConfigError(f"tasks={source!r}: no task.toml in it, or up to {DEEPEST} levels below")
    return [_load(folder, (folder / "task.toml").stat().st_mtime_ns) for folder in found]


def _configs(root: Path, depth: int = 0) -> list[Path]:
    if (root / "task.toml").is_file():
        return [root / "task.toml"]
    if depth == DEEPEST:
        return []
    inside = (path for path in root.iterdir() if path.is_dir() and not path.is_symlink())
    return [path for each in inside if not each.name.startswith(".") for path in _configs(each, depth + 1)]


@lru_cache(maxsize=4096)
def _load(folder: Path, version: int) -> HarborTask:
    try:
        config = tomllib.loads((folder / "task.toml").read_text())
        return _task(folder, config)
    except FileNotFoundError as error:
        raise ConfigError(f"task {folder}: no {Path(str(error.filename)).name} in it") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{folder}/task.toml: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder}/task.toml: {error}") from error


def _task(folder: Path, config: dict[str, Any]) -> HarborTask:
    environment = config.get("environment", {})
    for what, there in {
        "several steps (steps/)": (folder / "steps").is_dir(),
        "several containers (docker-compose.yaml)": (folder / "environment/docker-compose.yaml").is_file(),
        "the internet (allow_internet): make what it loads a part of its image": environment.get(
            "allow_internet", False
        ),
        "GPUs": environment.get("gpus", 0),
    }.items():
        if there:
            raise ValueError(f"it wants {what}, which sandboxes do not have")
    (folder / "tests" / "test.sh").stat()
    metadata = config.get("metadata", {})
    about = config.get("task", {})
    tags = (*metadata.get("tags", ()), *about.get("keywords", ()), *_difficulty(metadata))
    return HarborTask(
        id=str(about.get("name") or folder.name),
        folder=str(folder),
        instruction=(folder / "instruction.md").read_text().strip(),
        agent_s=_seconds(config, "agent"),
        verifier_s=_seconds(config, "verifier"),
        verifier_env={
            str(key): str(value) for key, value in config.get("verifier", {}).get("env", {}).items()
        },
        memory_bytes=_bytes(environment, "memory", 2 * GIB),
        disk_bytes=_bytes(environment, "storage", GIB),
        image=str(environment.get("docker_image") or ""),
        tags=tuple(str(tag) for tag in tags),
    )


def _difficulty(metadata: dict[str, Any]) -> tuple[str, ...]:
    return (str(metadata["difficulty"]),) if metadata.get("difficulty") else ()


def _seconds(config: dict[str, Any], part: str) -> float:
    seconds = float(config.get(part, {}).get("timeout_sec", 600.0))
    if not 0 < seconds < 86400:
        raise ValueError(f"{part}.timeout_sec={seconds} is not between 0 and a day")
    return seconds


def _bytes(environment: dict[str, Any], name: str, default: int) -> int:
    """`memory_mb = 2048`, or the older `memory = "2G"`."""
    if f"{name}_mb" in environment:
        return int(float(environment[f"{name}_mb"]) * MIB)
    if name not in environment:
        return default
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])i?B?", str(environment[name]).strip(), re.IGNORECASE)
    if parts is None:
        raise ValueError(f"environment.{name}={environment[name]!r} is no size like 2G")
    return int(float(parts[1]) * 1024 ** (1 + "KMGT".index(parts[2].upper())))


prepare(HarborTask)

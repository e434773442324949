"""From the command line to a typed configuration: Hydra composes, mistakes become one line."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from k2rl.config import Config
from k2rl.errors import ConfigError

ROOT = "run"
OVERRIDES_FILE = "overrides.yaml"
CONFIG_FILE = "config.yaml"

ConfigStore.instance().store(name="k2rl_schema", node=Config)


def config_folder() -> Path:
    """`conf/`: beside the code where k2rl is installed, at the top of a checkout."""
    installed = Path(__file__).parent / "conf"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "conf"


def config_groups() -> dict[str, list[str]]:
    """Each group's choices."""
    folders = sorted(path for path in config_folder().iterdir() if path.is_dir())
    return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}


def compose(overrides: Sequence[str]) -> Config:
    """The typed configuration of one job.

    Raises:
        ConfigError: one line naming the override that is wrong.
    """
    with _one_line_errors(), _hydra():
        return _typed(hydra.compose(ROOT, list(overrides)))


def jobs(overrides: Sequence[str], multirun: bool) -> list[list[str]]:
    """The overrides of each job of a (multi)run.

    Raises:
        ConfigError: an override that Hydra can't read.
    """
    with _one_line_errors():
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        if not multirun:
            return [list(overrides)]
        return [list(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]


def run_jobs(overrides: Sequence[str], multirun: bool, run: Callable[[Config, Path], int]) -> int:
    """Let Hydra run each job with its configuration and its output folder; stops at the first that fails."""

    def job(config: DictConfig) -> None:
        output = Path(HydraConfig.get().runtime.output_dir)
        code = run(_typed(config), output)
        if code:
            # Not an Exception: Hydra would print a traceback over what we have just said.
            raise SystemExit(code)

    sys.argv = ["k2rl", *(["--multirun"] if multirun else []), *overrides]
    hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=ROOT)(job)()
    return 0


def resumed(overrides: Sequence[str], multirun: bool = False) -> list[str]:
    """Overrides with those of the run named by `resume=` put before them, and its folder as output.

    Raises:
        ConfigError: the folder is no run's, or several runs are asked for.
    """
    values = dict(override.split("=", 1) for override in overrides if "=" in override)
    if not values.get("resume") or values["resume"] == "null":
        return list(overrides)
    if multirun:
        raise ConfigError(f"resume={values['resume']} goes on with one run; leave out --multirun")
    folder = Path(values["resume"]).expanduser().absolute()
    if not (folder / OVERRIDES_FILE).is_file():
        raise ConfigError(f"resume={values['resume']}: not the folder of a run (no {OVERRIDES_FILE} in it)")
    stored = list(OmegaConf.to_object(OmegaConf.load(folder / OVERRIDES_FILE)))  # type: ignore[arg-type]
    earlier = [item for item in stored if item.split("=", 1)[0] not in values]
    return [*earlier, *overrides, f"hydra.run.dir={folder}"]


def record(config: Config, overrides: Sequence[str], run_dir: Path) -> None:
    """Keep what the run was started with: the whole configuration, and the overrides to resume by."""
    own = [item for item in overrides if not item.startswith(("resume=", "hydra."))]
    OmegaConf.save(OmegaConf.structured(config), run_dir / CONFIG_FILE)
    OmegaConf.save(OmegaConf.create(own), run_dir / OVERRIDES_FILE)


def own_overrides() -> list[str]:
    """The overrides of the job that Hydra is running."""
    return list(HydraConfig.get().overrides.task)


def render(overrides: Sequence[str]) -> str:
    """The composed configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(compose(overrides)))


def _typed(config: DictConfig) -> Config:
    # Merged anew: a key added with `+` passes Hydra's checks and would silently do nothing.
    values = OmegaConf.to_container(config, resolve=True)
    typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    assert isinstance(typed, Config)
    return typed


@contextmanager
def _hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        yield


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from error


def _one_line(error: BaseException) -> str:
    cause = error
    while cause.__cause__ is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    key = getattr(cause, "full_key", None)
    first = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if not key:
        return first
    known = list(_keys(Config))
    if key in known:
        return f"{key}: {str(cause).splitlines()[0]}"
    close = difflib.get_close_matches(key, known, 1, 0.6)
    return f"{key}: no such key" + (f"; did you mean {close[0]}?" if close else "; docs/config.md lists all")


def _keys(schema: type, prefix: str = "") -> Iterator[str]:
    for field in fields(schema):
        default: Any = field.default_factory() if callable(field.default_factory) else field.default
        if is_dataclass(default):
            yield from _keys(type(default), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"

"""Virtual environments that hold a built wheel, without installing its dependencies again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def install(wheel: Path, folder: Path, dependencies: Sequence[Path]) -> Path:
    """Install a wheel in a new virtual environment that finds all else in `dependencies`.

    Plain lines of a `.pth` file extend the path without reading the `.pth` files found there, so an
    editable install of the same package in one of these folders stays out of sight.

    Returns:
        the environment's `bin`.
    """
    venv.EnvBuilder(symlinks=True).create(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in dependencies))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "-qq", "--no-deps", "--no-index", str(wheel)], check=True, timeout=120)
    return folder / "bin"


def everything() -> list[Path]:
    """The package folders of this Python."""
    return [Path(entry) for entry in sys.path if Path(entry).name == "site-packages"]


def base_alone(folder: Path) -> list[Path]:
    """One folder with what `pip install k2rl` brings, and nothing more."""
    folder.mkdir()
    waiting, linked = _needs("k2rl"), set()
    while waiting:
        name = waiting.pop()
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:  # needed on other systems or Pythons
            continue
        linked.add(name)
        waiting += [need for need in _needs(name) if need not in linked]
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            link = folder / top
            if not link.exists():
                link.symlink_to(distribution(name).locate_file(top))
    return [folder]


def _needs(name: str) -> list[str]:
    requirements = distribution(name).requires or []
    return [re.split(r"[^\w.-]", need)[0] for need in requirements if "extra ==" not in need]


def environment() -> dict[str, str]:
    """Environment variables of a user who has only what is installed."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

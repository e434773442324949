"""Where `conf/` is, and what there is to choose in it; read before Hydra is known to be installed."""

from __future__ import annotations

import re
from pathlib import Path


def config_folder() -> Path:
    """`conf/`: beside the code where k2rl is installed, at the top of a checkout."""
    installed = Path(__file__).parent / "conf"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "conf"


def config_groups() -> dict[str, list[str]]:
    """Each group's choices, the default first."""
    defaults = dict(
        re.findall(r"^  - (\w+): (\S+)$", (config_folder() / "run.yaml").read_text(), re.MULTILINE)
    )
    folders = sorted(path for path in config_folder().iterdir() if path.is_dir())
    return {
        folder.name: sorted(
            (path.stem for path in folder.glob("*.yaml")),
            key=lambda choice: (choice != defaults.get(folder.name), choice),
        )
        for folder in folders
    }


def experiments() -> dict[str, str]:
    """What each complete run is: the first comment of its file."""
    return {
        path.stem: re.findall(r"^# (?!@)(.*)$", path.read_text(), re.MULTILINE)[0]
        for path in sorted((config_folder() / "experiment").glob("*.yaml"))
    }

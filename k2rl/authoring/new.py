"""A package with an environment to be changed, from the template beside this module."""

from __future__ import annotations

import keyword
import sys
from pathlib import Path

from k2rl import __version__
from k2rl.errors import ConfigError

TEMPLATE = Path(__file__).with_name("template")
TAKEN = ("k2rl", "envs", "rubrics", "sandboxes", "conf", "tests")
#: Files of the template end so: as plain .py files they would be taken for modules of ours.
SUFFIX = ".template"


def make_package(name: str, where: Path) -> Path:
    """Make a package in a new folder of its name; gives the folder.

    Raises:
        ConfigError: the name is none for a package, or is taken; the folder is there already.
    """
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise ConfigError(f"{name!r} is no name for a package: use lower-case letters, digits and _")
    if name in TAKEN or name in sys.stdlib_module_names:
        raise ConfigError(f"the name {name!r} is taken: choose another one")
    folder = where / name
    if folder.exists():
        raise ConfigError(f"{folder} is there already")
    words = {"PACKAGE": name, "CLASS": "".join(word.capitalize() for word in name.split("_")) + "Env"}
    words["VERSION"] = __version__
    for source in sorted(TEMPLATE.rglob(f"*{SUFFIX}")):
        target = folder / _filled(str(source.relative_to(TEMPLATE)), words).removesuffix(SUFFIX)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_filled(source.read_text(encoding="utf-8"), words), encoding="utf-8")
    return folder


def _filled(text: str, words: dict[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(f"__{word}__", value)
    return text

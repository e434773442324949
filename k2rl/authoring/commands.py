"""`k2rl envs list`, `k2rl envs check` and `k2rl envs new`."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

import msgspec

from k2rl.errors import ConfigError

CHECK = """\
Look at an environment before training on it: that tasks are the same for the
same seed, in other processes too, and in one split only; that Gymnasium's
check_env and our contract accept its answers; that demonstrations earn
something, nonsense is answered, equal seeds give equal episodes, rewards are
in their range; that closed episodes leave nothing behind; and how fast it is.
Arguments of its constructor follow the id: key=value, with values in JSON.
Exit code 1: there is a FAULT.
"""

NEW = """\
Make a package with an environment of your own in the folder NAME, to be
changed: the environment, its test, and the entry point by which k2rl finds
it once it is installed.
"""


def add_to(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add them to the actions of `k2rl envs`."""
    actions.add_parser("list", help="list the registered environments").set_defaults(run=_list)

    plain = argparse.RawDescriptionHelpFormatter
    check = actions.add_parser(
        "check", help="whether an environment can be trained on", description=CHECK, formatter_class=plain
    )
    check.add_argument("id", metavar="ID", help="as in env.id: see `k2rl envs list`, or module:Class")
    check.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help="of its constructor")
    check.add_argument("--tasks", type=int, default=4, help="tasks to play; at least one a kind is (4)")
    check.add_argument("--deadline", type=float, default=60.0, help="seconds a call to it may take (60)")
    check.set_defaults(run=_check)

    new = actions.add_parser(
        "new", help="make a package for your own environment", description=NEW, formatter_class=plain
    )
    new.add_argument("name", metavar="NAME", help="of the package, such as my_envs")
    new.set_defaults(run=_new)


def _list(arguments: argparse.Namespace) -> int:
    import envs.registry

    for id, description in envs.registry.available().items():
        print(f"{id:<20} {description}")
    for id, error in envs.registry.broken().items():
        for note in getattr(error, "__notes__", []):
            print(f"\n{id}: {note}", file=sys.stderr)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from k2rl.authoring.check import Settings, check

    if arguments.tasks < 1 or not arguments.deadline > 0:
        raise ConfigError("--tasks and --deadline must be above 0")
    settings = Settings(arguments.tasks, arguments.deadline)
    findings = asyncio.run(check(arguments.id, keywords_of(arguments.arguments), settings))
    for finding in findings:
        print(f"{finding.status:<6} {finding.about:<24} {finding.detail}")
    faults = sum(finding.status == "FAULT" for finding in findings)
    print(f"{arguments.id}: {f'{faults} of {len(findings)} checks found a fault' if faults else 'no fault'}")
    return int(faults > 0)


def _new(arguments: argparse.Namespace) -> int:
    from k2rl.authoring.new import make_package

    folder = make_package(arguments.name, Path.cwd())
    print(
        f"{folder}: change {arguments.name}/envs.py, then\n"
        f"  pip install --no-deps -e {folder.name}\n"
        f"  k2rl envs check {arguments.name}\n"
        f"  k2rl train experiment=tiny env.id={arguments.name} warm_start=none"
    )
    return 0


def keywords_of(words: list[str]) -> dict[str, Any]:
    """Arguments of a constructor.

    Raises:
        ConfigError: a word is no KEY=VALUE.
    """
    keywords: dict[str, Any] = {}
    for word in words:
        key, given, value = word.partition("=")
        if not given or not key.isidentifier():
            raise ConfigError(f"{word!r} is not KEY=VALUE, an argument of the environment's constructor")
        try:
            keywords[key] = msgspec.json.decode(value)
        except msgspec.DecodeError:
            keywords[key] = value
    return keywords

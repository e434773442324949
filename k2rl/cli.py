"""The `k2rl` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from k2rl.errors import ConfigError, RunError

EPILOG = """\
examples:
  k2rl train experiment=quickstart
  k2rl train experiment=quickstart optimizer=adamw rollout.group_size=16 seed=1
  k2rl train --multirun experiment=quickstart seed=1,2,3
  k2rl train resume=outputs/quickstart/2026-01-31_12-00-00
  k2rl eval model.path=outputs/quickstart/2026-01-31_12-00-00/model env=calculator
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 1 (the run failed), 2 (wrong input), 130 (interrupted)."""
    # Environments and rubrics named as `module:Class` are looked for in the working folder too; last, since
    # a folder there may be called as one of our own packages (`envs`).
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    arguments, rest = _parser().parse_known_args(argv)
    if arguments.command in ("train", "eval"):
        arguments.overrides = [*arguments.overrides, *rest]
    elif rest:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(arguments.run(arguments))
    except ConfigError as error:
        print(f"k2rl: {error}", file=sys.stderr)
        return error.exit_code
    except RunError as error:
        print(f"k2rl: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="k2rl",
        description="Agentic RL post-training after the Kimi K2 report.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    overrides = "group=choice or key=value; see docs/config.md"

    train = commands.add_parser(
        "train",
        help="train a policy by reinforcement learning",
        epilog=_groups(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument(
        "-m", "--multirun", action="store_true", help="run every combination of key=a,b values"
    )
    train.add_argument("--cfg", action="store_true", help="print the composed configuration and stop")
    train.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=overrides)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "eval",
        help="evaluate a Hugging Face checkpoint on an environment's held-out tasks",
        epilog=_groups(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=overrides)
    evaluate.set_defaults(run=_evaluate)

    envs = commands.add_parser("envs", help="environments").add_subparsers(required=True, metavar="ACTION")
    envs.add_parser("list", help="list the registered environments").set_defaults(run=_list_environments)

    report = commands.add_parser("report", help="write report.html of a run's folder anew")
    report.add_argument("run_dir", type=Path)
    report.set_defaults(run=_report)
    return parser


def _groups() -> str:
    from k2rl.composition import config_groups

    lines = [f"  {group:<12} {', '.join(choices)}" for group, choices in config_groups().items()]
    return "groups and their choices:\n" + "\n".join(lines)


def _train(arguments: argparse.Namespace) -> int:
    from k2rl import commands, composition

    if arguments.cfg:
        print(composition.render(arguments.overrides), end="")
        return 0
    return commands.train(arguments.overrides, arguments.multirun)


def _evaluate(arguments: argparse.Namespace) -> int:
    from k2rl import commands

    return commands.evaluate(arguments.overrides)


def _list_environments(arguments: argparse.Namespace) -> int:
    import envs.registry

    for id, description in envs.registry.available().items():
        print(f"{id:<20} {description}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from k2rl.composition import CONFIG_FILE
    from k2rl.tracking.report import write_report

    if not (arguments.run_dir / CONFIG_FILE).is_file():
        raise ConfigError(f"{arguments.run_dir} is not the folder of a run (no {CONFIG_FILE} in it)")
    print(write_report(arguments.run_dir))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The `k2rl` command."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from k2rl import __version__, sandbox_commands, serving_command
from k2rl.authoring import commands as authoring_commands
from k2rl.choices import config_groups, experiments
from k2rl.errors import ConfigError, RunError

EPILOG = """\
`k2rl COMMAND --help` says more. All that a run writes is in
outputs/<name>/<time>/ under the working folder.

examples:
  k2rl train experiment=tiny          a look around: every part of a run, in a minute
  k2rl train experiment=quickstart    a small model learns to use a calculator
  k2rl eval model.path=outputs/quickstart/2026-01-31_12-00-00/model
  k2rl envs list

exit codes:
  0 done, 1 the run failed, 2 wrong input, nothing was started, 130 interrupted
"""

TRAIN = """\
Train a model by reinforcement learning. The run's folder,
outputs/<name>/<time>/, gets report.html, summary.json, metrics, sample
episodes, logs, checkpoints and the trained model as a Hugging Face folder.
Ctrl-C saves a checkpoint and stops; a second Ctrl-C stops at once.
"""

TRAIN_EXAMPLES = """
examples:
  k2rl train experiment=quickstart optimizer=adamw rollout.group_size=16 seed=1
  k2rl train --cfg experiment=quickstart
  k2rl train --multirun experiment=quickstart seed=1,2,3
  k2rl train experiment=quickstart warm_start=none env.id=my_package.my_env:MyEnv
  k2rl train resume=outputs/quickstart/2026-01-31_12-00-00
"""

SFT = """\
Train a model to imitate chats: supervised fine-tuning on the assistant's
tokens, tool calls included. data.path is a JSONL file, a chat a line
(docs/sft.md), or `curated`. The run's folder, outputs/sft/<time>/, gets
report.html, summary.json, metrics, checkpoints and the model as a Hugging
Face folder. Ctrl-C and resume= are as with `k2rl train`.
"""

SFT_EXAMPLES = """
examples:
  k2rl sft data.path=chats.jsonl train.steps=200 sft.lr=2e-4
  k2rl sft model.path=HuggingFaceTB/SmolLM2-360M-Instruct data.path=chats.jsonl data.held_out=more.jsonl
  k2rl sft experiment=tiny data.path=curated
  k2rl sft resume=outputs/sft/2026-01-31_12-00-00
"""

EVAL = """\
Measure a model on an environment's held-out tasks, one greedy episode a task.
Prints the mean reward with its 95 % interval; the episodes themselves are in
outputs/eval/<time>/evaluations/eval.json.

With suite=NAME, measure any model on a suite of tasks (docs/evaluation.md), or
on the held-out tasks of any environment, by its id or as module:Class:
model= is a checkpoint, an OpenAI-compatible http://…/v1, or a baseline that
proves the suite: gold, null, cheat:NAME. The same command, given again, goes
on where it was stopped. `k2rl eval compare FOLDER FOLDER` sets two side by side.
"""

EVAL_EXAMPLES = """
examples:
  k2rl eval model.path=outputs/quickstart/2026-01-31_12-00-00/model
  k2rl eval model.path=HuggingFaceTB/SmolLM2-360M-Instruct env.eval_tasks=32
  k2rl eval suite=humaneval model=gold
  k2rl eval suite=twenty_four model=outputs/quickstart/2026-01-31_12-00-00/model env.tries=1
  k2rl eval suite=humaneval model=http://127.0.0.1:8000/v1 samples=10 k=1,10 temperature=0.8
  k2rl eval compare outputs/eval/humaneval/FIRST outputs/eval/humaneval/SECOND
"""

PLAN = """\
Plan a push of a model's weights and simulate it on a cluster, which need not
be there: how long it takes, what binds, the physical floor, and a picture of
the timeline. Every number is simulated. `k2rl plan calibrate` measures this
machine and writes a sheet that cluster= takes.
"""

PLAN_EXAMPLES = """
examples:
  k2rl plan model=kimi_k2 dtype=fp8 cluster=h20 gpus=256
  k2rl plan model=kimi_k2 cluster=h800 gpus=2048 strategy=shard_aware output=json
  k2rl plan model=glm_4_5_air dtype=bf16 cluster=h800 gpus=8 strategy=moonshot bucket_gib=3.02
  k2rl plan calibrate
"""

JUDGE = """\
Judge episodes that are there. FILE.jsonl has trajectories, or rows with
`response`, perhaps `prompt`, `label`, `group`, and what the judge wants to know
(`answer`, `instructions`, …). Prints the share that failed, agreement with the
labels, the confusion of the two, and what it cost.
"""

JUDGE_EXAMPLES = """
keys: reward, reward.<argument>, threshold, deadline_s, parallel, out, output

examples:
  k2rl judge answers.jsonl reward=math
  k2rl judge answers.jsonl reward=exact reward.place=whole out=judged.jsonl
  k2rl judge answers.jsonl reward=pointwise 'reward.model={url: "http://127.0.0.1:8000/v1", name: judge}'
"""

DIFFICULTY = """\
Choose the tasks worth training on, from the results of
`k2rl eval suite=… samples=N`: those solved sometimes, and not by guessing
(guess=RESULTS, of a model that answered without reasoning). Writes them with
their pass@k and a tag: hard, moderate, easy.
"""

STACKS = """\
Say of every process of a live run what it is doing and for how long, and where the one stands that has been
busy the longest. Nothing is stopped, and nobody has to answer."""

OVERRIDE = """\
what differs from the defaults: group=choice (see below) or key=value (`k2rl train --cfg` prints every key,
docs/config.md explains them)"""

MULTIRUN = """\
run every combination of group=a,b and key=1,2, one after the other; stops at the first that fails"""

EVAL_GROUPS = (
    "budget",
    "checkpoint_engine",
    "cluster",
    "env",
    "experiment",
    "inference",
    "model",
    "rollout",
    "rubric",
    "tracking",
)

SFT_GROUPS = ("cluster", "experiment", "model", "optimizer", "tracking", "train")

PLATFORM = ("hydra", "ray", "torch", "transformers", "vllm")
"""Modules of the training platform, which a plain `pip install k2rl` leaves out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 1 (the run failed), 2 (wrong input), 130 (interrupted)."""
    # Environments and rubrics named as `module:Class` are looked for in the working folder too; last, since
    # a folder there may be called as one of our own packages (`envs`).
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    # A crash in native code says where; not where stderr is somebody's object.
    with contextlib.suppress(io.UnsupportedOperation, RuntimeError, AttributeError):
        if not faulthandler.is_enabled():
            faulthandler.enable()
    arguments, rest = _parser().parse_known_args(argv)
    # Overrides after an option end up in the rest; none of them starts with a dash.
    takes_overrides = arguments.command in ("train", "sft", "eval")
    unknown = [word for word in rest if word.startswith("-") or not takes_overrides]
    if unknown:
        _parser().error(f"unrecognized arguments: {' '.join(unknown)}")
    if takes_overrides:
        arguments.overrides = [*arguments.overrides, *rest]
    try:
        return int(arguments.run(arguments))
    except ConfigError as error:
        print("\n".join([f"k2rl: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return error.exit_code
    except RunError as error:
        print(f"k2rl: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("k2rl: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="k2rl",
        description="Agentic RL post-training of language models, after the Kimi K2 report.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"k2rl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    train = commands.add_parser(
        "train",
        help="train a model by reinforcement learning",
        description=TRAIN,
        epilog=_choices(tuple(config_groups())) + TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("-m", "--multirun", action="store_true", help=MULTIRUN)
    train.add_argument(
        "--cfg", action="store_true", help="print the configuration that the overrides make, and stop"
    )
    train.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=OVERRIDE)
    train.set_defaults(run=_train)

    fine_tune = commands.add_parser(
        "sft",
        help="train a model to imitate chats",
        description=SFT,
        epilog=_choices(SFT_GROUPS) + SFT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fine_tune.add_argument("-m", "--multirun", action="store_true", help=MULTIRUN)
    fine_tune.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=OVERRIDE)
    fine_tune.set_defaults(run=_fine_tune)

    evaluate = commands.add_parser(
        "eval",
        help="measure a model on an environment's held-out tasks",
        description=EVAL,
        epilog=_choices(EVAL_GROUPS) + EVAL_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=OVERRIDE)
    evaluate.set_defaults(run=_evaluate)

    plan = commands.add_parser(
        "plan",
        help="simulate a push of weights on a cluster that need not be there",
        description=PLAN,
        epilog=_plan_keys() + PLAN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument("words", nargs="*", metavar="KEY=VALUE", help="see below; or `calibrate`")
    plan.set_defaults(run=_plan)

    envs = commands.add_parser(
        "envs", help="what there is to learn: `k2rl envs list`, `check`, `new`, `serve`"
    )
    actions = envs.add_subparsers(required=True, metavar="ACTION", title="actions")
    authoring_commands.add_to(actions)
    serving_command.add_to(actions)

    stacks = commands.add_parser(
        "stacks", help="what every process of a run on this host is doing now", description=STACKS
    )
    stacks.add_argument("--all", action="store_true", help="the Python stacks of all threads, too")
    stacks.add_argument("run_dir", type=Path, metavar="RUN_FOLDER", help="such as outputs/quickstart/<time>")
    stacks.set_defaults(run=_stacks)

    sandbox = commands.add_parser("sandbox", help="where untrusted code runs: `k2rl sandbox doctor`")
    sandbox_commands.add_to(sandbox.add_subparsers(required=True, metavar="ACTION", title="actions"))

    swe = commands.add_parser("swe", help="repository tasks: `k2rl swe build REPOSITORY FOLDER`")
    builders = swe.add_subparsers(required=True, metavar="ACTION", title="actions")
    build = builders.add_parser("build", help="make tasks of the commits of a local git repository")
    build.add_argument("repository", type=Path, metavar="REPOSITORY", help="a git repository")
    build.add_argument("out", type=Path, metavar="FOLDER", help="where tasks.jsonl goes")
    build.add_argument("--limit", type=int, default=50, help="commits that are looked at, newest first (50)")
    build.add_argument("--seconds", type=float, default=60.0, help="of CPU time for a commit's tests (60)")
    build.add_argument("--sandbox", default="bubblewrap", help="where tests are tried out (bubblewrap)")
    build.set_defaults(run=_build_tasks)

    judge = commands.add_parser(
        "judge",
        help="judge a file of episodes",
        description=JUDGE,
        epilog=_rewards() + JUDGE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    judge.add_argument("words", nargs="*", metavar="FILE.jsonl KEY=VALUE", help="see below")
    judge.set_defaults(run=_judge)

    difficulty = commands.add_parser(
        "difficulty",
        help="choose tasks by how often a model solves them",
        description=DIFFICULTY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    difficulty.add_argument(
        "words",
        nargs="*",
        metavar="RESULTS_FOLDER KEY=VALUE",
        help="out=FILE.jsonl tasks=FILE.jsonl guess=RESULTS_FOLDER low=0 high=1 guessed=0 k=1,4 tags=a,b",
    )
    difficulty.set_defaults(run=_difficulty)

    report = commands.add_parser("report", help="write report.html of a run anew, finished or not")
    report.add_argument("run_dir", type=Path, metavar="RUN_FOLDER", help="such as outputs/quickstart/<time>")
    report.set_defaults(run=_report)
    return parser


def _choices(groups: Sequence[str]) -> str:
    """The complete runs and each group's choices, as a help text lists them."""
    runs = [f"  {name:<12} {text}" for name, text in experiments().items()]
    choices = config_groups()
    rest = [f"  {group:<12} {', '.join(choices[group])}" for group in groups if group != "experiment"]
    return "\n".join(
        [
            "complete runs to start from (experiment=NAME):",
            *runs,
            "",
            "groups and their choices, the default first (group=choice):",
            *rest,
            "",
        ]
    )


def _train(arguments: argparse.Namespace) -> int:
    _require("train", PLATFORM[:1] if arguments.cfg else PLATFORM)
    from k2rl import commands, composition

    if arguments.cfg:
        print(composition.render(arguments.overrides), end="")
        return 0
    return commands.train(arguments.overrides, arguments.multirun)


def _fine_tune(arguments: argparse.Namespace) -> int:
    _require("sft", tuple(module for module in PLATFORM if module != "vllm"))
    from k2rl import commands

    return commands.fine_tune(arguments.overrides, arguments.multirun)


def _evaluate(arguments: argparse.Namespace) -> int:
    words = arguments.overrides
    if words[:1] == ["compare"] or any(word.startswith("suite=") for word in words):
        _require("eval", ("httpx", "jinja2", "numpy"))
        from k2rl.evaluation import suite_command

        compares = words[0] == "compare"
        print(suite_command.compare(words[1:]) if compares else suite_command.run(words))
        return 0
    _require("eval", PLATFORM)
    from k2rl import commands

    return commands.evaluate(words)


def _plan_keys() -> str:
    """The keys of `k2rl plan` as its help lists them."""
    rows = {
        "model": "kimi_k2, deepseek_v31, qwen3_235b_a22b, glm_4_5_air",
        "dtype": "fp8, bf16",
        "cluster": "h20, h100, h200, h800, cpu, or the path of a sheet",
        "gpus": "number of GPUs; 0: one host",
        "strategy": "broadcast, shard_aware, delta, moonshot (their engine, as published)",
        "changed": "for delta: the share of each tensor's rows that has changed (0.05)",
        "tp, ep": "ranks of an inference replica; ranks its experts are spread over",
        "bucket_gib": "most GiB of a bucket; slots: buckets in turn (0: all are kept)",
        "output": "text, json",
        "picture": "where the timeline goes (.svg)",
        "device.*": "a value of the cluster's sheet: device.network_gbps=100",
    }
    return "\n".join(["keys, the default first:", *(f"  {key:<12} {text}" for key, text in rows.items()), ""])


def _plan(arguments: argparse.Namespace) -> int:
    _require("plan", ("omegaconf", "numpy", "xxhash"))
    from k2rl import planning_command

    print(planning_command.run(arguments.words))
    return 0


def _rewards() -> str:
    """What can judge, where `k2rl judge --help` is what is asked for: it takes a second to know."""
    if "judge" not in sys.argv[1:2] or find_spec("yaml") is None:
        return ""
    from k2rl import judging_command

    return judging_command.rewards() + "\n"


def _judge(arguments: argparse.Namespace) -> int:
    _require("judge", ("yaml", "httpx", "jsonschema"))
    from k2rl import judging_command

    print(judging_command.run(arguments.words))
    return 0


def _difficulty(arguments: argparse.Namespace) -> int:
    _require("difficulty", ("numpy",))
    from k2rl.evaluation import difficulty

    print(difficulty.run(arguments.words))
    return 0


def _build_tasks(arguments: argparse.Namespace) -> int:
    import asyncio

    from envs.coding.swe_build import build_here

    if arguments.limit < 1 or not arguments.seconds > 0:
        raise ConfigError("--limit and --seconds must be above 0")
    made = asyncio.run(
        build_here(
            arguments.repository.resolve(),
            arguments.out,
            sandbox=arguments.sandbox,
            limit=arguments.limit,
            seconds=arguments.seconds,
            say=print,
        )
    )
    tasks = arguments.out / "tasks.jsonl"
    print(f"{made} tasks: {tasks}; prove them: k2rl eval suite=swe path={tasks} model=gold")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    _require("report", ("jinja2", "omegaconf"))
    from k2rl.composition import CONFIG_FILE
    from k2rl.tracking.report import write_report

    if not (arguments.run_dir / CONFIG_FILE).is_file():
        raise ConfigError(f"{arguments.run_dir} is not the folder of a run (no {CONFIG_FILE} in it)")
    print(write_report(arguments.run_dir))
    return 0


def _stacks(arguments: argparse.Namespace) -> int:
    _require("stacks", ("psutil",))
    from k2rl.diagnosis.hang import diagnose

    logs = arguments.run_dir / "logs"
    if not logs.is_dir():
        raise ConfigError(f"{arguments.run_dir} is not the folder of a run (no logs in it)")
    found = diagnose(logs)
    if not found.processes:
        raise ConfigError(f"no process of {arguments.run_dir} that you may look at is alive on this host")
    print(found.whole if arguments.all else found.essence)
    return 0


def _require(command: str, modules: Sequence[str]) -> None:
    """Say what to install before an import fails deep in the code.

    Raises:
        ConfigError: one line that names what is missing.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"`k2rl {command}` needs {', '.join(missing)}, not installed here: "
            "pip install 'k2rl[cpu]', or 'k2rl[cuda]' for NVIDIA GPUs"
        )


if __name__ == "__main__":
    sys.exit(main())

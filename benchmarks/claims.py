"""Claims of the papers on a small scale: what a part of K2's recipe does, beside a run without it.

A tiny random model, which a warm start has taught to answer guests (`guests_env.py`) and to say sentences of
a small grammar, is trained by the whole loop with the real vLLM. All trainings of a claim begin with the same
weights and take as many samples (steps of 8 groups of 8, or 16 of them for the temperature): each arm for
each seed, in one started run.

    budget       k1.5's length reward and K2.5's Toggle: answers become shorter, at equal reward
    ptx          the PTX loss: held-out sentences stay as likely as they were, at equal reward
    temperature  a decay from 1 to 0.25 finds what is rare, as 1 does and 0.25 does not
    objective    K2's objective beside GRPO's: the reward is as high, and a judge's jitter among answers that
                 are equally good moves K2 by little, GRPO, which divides by the spread, as much as the truth

    make bench-claims
    make bench-claims ARGS="budget ptx --seeds 0 1 2 --plots docs"

Writes a file for each training to outputs/benchmarks/claims-*, or to `--folder`, where those that have been
made before are taken as they are, and with `--plots` a picture for each claim. Exits with 1 where a claim
does not hold for every seed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from typing import TypedDict

import in_process
from arms import arm, back_to, keep
from guests_env import Guests
from panels import Panel, draw

from k2rl import launch
from k2rl.composition import compose
from k2rl.config import Config
from k2rl.loop import held_out, learn, roll_out, rollout_metrics
from k2rl.objective.temperature import temperature_at
from k2rl.preflight import Preflight, preflight
from k2rl.rollouts.episode import Attempt
from k2rl.run import Run
from k2rl.workers.recovery import Recovery

SETTINGS = (
    "experiment=claims",
    *("tracking.live=off", "tracking.tensorboard=false", "tracking.samples_per_step=0"),
    "tracking.record_rollouts=false",
)
#: Of the one run in which all are trained: its warm start shows the tasks of all claims.
ALL_KINDS = "env.kwargs.only=''"
NLL, GRADIENT = "ptx/held_out_nll", "train/grad_norm"


class Result(TypedDict):
    """Of one arm and seed."""

    #: Of each step, as in metrics.jsonl; the trainer's are missing where there was nothing to learn.
    steps: list[dict[str, float]]
    #: NLL of the held-out sentences before the first step, in nats a token.
    nll: float
    #: On held-out tasks afterwards, sampled at the temperature of the last step: means.
    reward: float
    tokens: float


Results = dict[str, Result]
"""Of one seed, by arm."""


@dataclass(frozen=True)
class Claim:
    #: Kind of the tasks.
    kind: str
    steps: int
    #: By name, what differs from `SETTINGS`. The last ones are beside the first.
    arms: dict[str, tuple[str, ...]]
    #: What is drawn: metric and title.
    shown: dict[str, str]
    #: Of one seed: what is to be true, and whether it is.
    holds: Callable[[Results], dict[str, bool]]
    #: What differs from `SETTINGS` in all arms.
    always: tuple[str, ...] = ()


def shorter(found: Results) -> dict[str, bool]:
    free = found["no length reward"]
    rest = {name: result for name, result in found.items() if result is not free}
    return {
        # 128 answers leave 5 % of their mean length open.
        f"{name}: {result['tokens'] / free['tokens']:.2f} of the tokens, fewer at equal reward (0.05)": (
            result["tokens"] < free["tokens"] and result["reward"] > free["reward"] - 0.05
        )
        for name, result in rest.items()
    }


def kept(found: Results) -> dict[str, bool]:
    without, with_ptx = found["without PTX"], found["PTX"]
    rise = curve(without, NLL)[-1] - without["nll"]
    return {
        "NLL rises by less than a quarter of what it does without": (
            rise > 0.1 and curve(with_ptx, NLL)[-1] - with_ptx["nll"] < rise / 4
        ),
        "reward not lower by more than 0.05": with_ptx["reward"] > without["reward"] - 0.05,
    }


def explored(found: Results) -> dict[str, bool]:
    hot, cold, decay = found["1"], found["0.25"], found["1 to 0.25"]
    return {
        "the decay's reward is above 0.25's by 0.2": decay["reward"] > cold["reward"] + 0.2,
        "and not below 1's": decay["reward"] > hot["reward"] - 0.02,
    }


def unmoved(found: Results) -> dict[str, bool]:
    ours, theirs = found["K2, jitter"], found["GRPO, jitter"]
    return {
        "K2's reward is not below GRPO's by more than 0.02": (
            found["K2"]["reward"] > found["GRPO"]["reward"] - 0.02
        ),
        "nor is it with jitter": ours["reward"] > theirs["reward"] - 0.02,
        "with jitter K2's gradient vanishes where tasks are solved (0.02), GRPO's does not (0.1)": (
            gradient_left(ours) < 0.02 and gradient_left(theirs) > 0.1
        ),
    }


def gradient_left(result: Result) -> float:
    """Norm of the gradient in the five steps with the best rewards, their median, beside the first step's."""
    steps = [step for step in result["steps"] if GRADIENT in step]
    best = sorted(steps, key=lambda step: -step["reward/mean"])[:5]
    return median(step[GRADIENT] for step in best) / steps[0][GRADIENT]


REWARD = {"reward/mean": "reward of sampled answers"}
FORGETTING = {NLL: "NLL of held-out sentences (nats a token)"}
JITTER = "env.kwargs.jitter=0.01"
CLAIMS = {
    "budget": Claim(
        "chatty",
        28,
        {
            "no length reward": (),
            "k1.5's length reward": ("budget=length_reward", "budget.length_warmup_steps=4"),
            "Toggle": ("budget=toggle",),
        },
        {**REWARD, "rollout/tokens_mean": "sampled tokens an answer"},
        shorter,
    ),
    "ptx": Claim(
        "chatty",
        14,
        {"without PTX": (), "PTX": ("ptx.weight=0.2",)},
        {**REWARD, **FORGETTING},
        kept,
        # High enough to forget by.
        ("optimizer.lr=2e-3",),
    ),
    "temperature": Claim(
        "rare",
        14,
        {
            "1": (),
            "0.25": ("temperature.start=0.25",),
            "1 to 0.25": ("temperature.schedule=linear", "temperature.end=0.25"),
        },
        {**REWARD, "train/entropy": "entropy (nats a token)"},
        explored,
        # After the warm start 3 % of answers at 1 are the rare one, one in a million at 0.25: of the 128 of
        # a step four, or none of a whole training.
        ("rollout.tasks_per_step=16",),
    ),
    "objective": Claim(
        "chatty",
        28,
        {
            "K2": (),
            "GRPO": ("objective=grpo",),
            "K2, jitter": (JITTER,),
            "GRPO, jitter": ("objective=grpo", JITTER),
        },
        {**REWARD, GRADIENT: "norm of the gradient"},
        unmoved,
    ),
}


async def trained(run: Run, config: Config) -> Result:
    """One training, and what came of it."""
    total = config.train.steps
    env = Guests(**config.env.kwargs)
    tasks = list(islice(env.tasks("eval", 0), config.env.eval_tasks))
    ours = arm(replace(run, prepared=replace(run.prepared, env=env)), config)
    before, steps = await held_out(ours), []
    for step in range(1, total + 1):
        rollouts, seconds = await roll_out(ours, step)
        metrics = rollout_metrics(rollouts.trajectories, seconds) | rollouts.metrics
        await learn(ours, step, rollouts, metrics)
        steps.append(metrics)
    await ours.pool.close()
    last = temperature_at(config.temperature, total - 1, total)
    episodes = await run.scheduler.run(
        [Attempt(f"after-{task.id}", task.id, task, last, number) for number, task in enumerate(tasks)]
    )
    return {
        "steps": steps,
        "nll": before[NLL],
        "reward": fmean(episode.reward for episode in episodes),
        "tokens": fmean(episode.num_sampled for episode in episodes),
    }


async def train_all(prepared: Preflight, run_dir: Path, wanted: Sequence[Training], served: bool) -> None:
    """All of them, each from the weights that the warm start leaves; with vLLM, if they are `served`."""
    with closing(Recovery(run_dir, 0)) as recovery:
        started = (
            launch.started(prepared, run_dir, None, trains=True, recovery=recovery)
            if served
            else in_process.started(prepared, run_dir)
        )
        async with started as run:
            await train_each(run, wanted)


async def train_each(run: Run, wanted: Sequence[Training]) -> None:
    await run.worker.publish()
    await launch.warm_start(run)
    start = run.run_dir / "start"
    version = await keep(run, start)
    for training in wanted:
        began = time.monotonic()
        config = training.config
        await back_to(run, start, config.optimizer.lr, version)
        result = await trained(run, config)
        training.file.write_text(json.dumps(result))
        print(f"{training.told(result)}, {time.monotonic() - began:.0f} s", flush=True)


@dataclass(frozen=True)
class Training:
    claim: str
    arm: str
    seed: int
    folder: Path

    @property
    def file(self) -> Path:
        number = list(CLAIMS[self.claim].arms).index(self.arm)
        return self.folder / f"{self.claim}-{number}-seed{self.seed}.json"

    @property
    def config(self) -> Config:
        claim = CLAIMS[self.claim]
        kind = f"env.kwargs.only={claim.kind}"
        settings = (*SETTINGS, kind, *claim.always, *claim.arms[self.arm])
        return compose([*settings, f"seed={self.seed}", f"train.steps={claim.steps}"])

    def result(self) -> Result:
        found: Result = json.loads(self.file.read_text())
        return found

    def told(self, result: Result) -> str:
        first, last = result["steps"][0]["reward/mean"], result["reward"]
        return (
            f"{self.claim}, {self.arm}, seed {self.seed}: reward {first:.3f} -> {last:.3f}, "
            f"tokens {result['steps'][0]['rollout/tokens_mean']:.1f} -> {result['tokens']:.1f}, "
            f"NLL {result['nll']:.2f} -> {curve(result, NLL)[-1]:.2f}"
        )


def curve(result: Result, metric: str) -> list[float]:
    """A metric of all steps; in one that has learned nothing that of the one before, and no gradient.

    The NLL is from step 0.
    """
    values = [result["nll"]] if metric == NLL else []
    for step in result["steps"]:
        before = values[-1] if values and metric != GRADIENT else 0.0
        values.append(step.get(metric, before))
    return values


def picture(claim: Claim, found: dict[str, list[Result]], file: Path) -> None:
    draw(
        [
            Panel(
                title,
                {name: [curve(result, metric) for result in of_seeds] for name, of_seeds in found.items()},
                first=0 if metric == NLL else 1,
                log=metric == GRADIENT,
            )
            for metric, title in claim.shown.items()
        ],
        file,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("claims", nargs="*", help=f"of {', '.join(CLAIMS)}; all, if none is named")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    new = Path("outputs/benchmarks") / f"claims-{datetime.now():%Y-%m-%d_%H-%M-%S}"
    parser.add_argument("--folder", type=Path, default=new, help="of results")
    parser.add_argument("--in-process", action="store_true", help="sample in this process, without vLLM")
    parser.add_argument("--plots", type=Path, help="folder for a picture of each claim")
    parser.add_argument("--threads", type=int, default=0, help="of the trainer")
    arguments = parser.parse_args()
    names = arguments.claims or list(CLAIMS)
    if unknown := [name for name in names if name not in CLAIMS]:
        parser.error(f"there is no claim {unknown[0]!r}: choose from {', '.join(CLAIMS)}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    trainings = [
        Training(name, of_arm, seed, arguments.folder)
        for name in names
        for seed in arguments.seeds
        for of_arm in CLAIMS[name].arms
    ]
    if wanted := [training for training in trainings if not training.file.exists()]:
        prepared = preflight(compose([*SETTINGS, ALL_KINDS, f"train.num_threads={arguments.threads}"]))
        with closing(prepared), tempfile.TemporaryDirectory() as run_dir:
            asyncio.run(train_all(prepared, Path(run_dir), wanted, not arguments.in_process))
    reached = True
    for name in names:
        claim = CLAIMS[name]
        found = {
            of_arm: [Training(name, of_arm, seed, arguments.folder).result() for seed in arguments.seeds]
            for of_arm in claim.arms
        }
        for number, seed in enumerate(arguments.seeds):
            for what, holds in claim.holds({of_arm: of[number] for of_arm, of in found.items()}).items():
                reached &= holds
                print(f"{name}, seed {seed}: {'holds' if holds else 'DOES NOT HOLD'}: {what}")
        if arguments.plots:
            picture(claim, found, arguments.plots / f"claim-{name}.svg")
    return int(not reached)


if __name__ == "__main__":
    sys.exit(main())

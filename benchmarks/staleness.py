"""What stale tokens cost: partial rollouts with a staleness of up to 2, beside synchronous steps.

A tiny model, which a warm start has taught eight words, learns which of them are polite, in episodes of a
lognormal number of turns (median 2, 8 at most), from steps of 8 groups of 4, until nearly all that it says
is. From the same weights each seed is trained twice by the whole loop with the real vLLM, on equally many
tokens: in synchronous steps, and with twice as many groups in play, of which the unfinished are parked and
old tokens weighed by truncated importance sampling. Then 64 episodes on held-out tasks are sampled. Intervals
are of 95 %: of a mean of episodes (normal), of seeds and of differences within seeds (Student's t).

    make bench-staleness
    make bench-staleness ARGS="--seeds 0 1 2 3 4 --tokens 12000"

Writes a file for each training to outputs/benchmarks/staleness-*, or to `--folder`, where those that have
been made before are taken as they are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypedDict

from arms import arm, back_to

from k2rl import launch
from k2rl.composition import compose
from k2rl.loop import learn, roll_out, rollout_metrics
from k2rl.preflight import Preflight, preflight
from k2rl.rollouts.episode import Attempt
from k2rl.run import Run
from k2rl.workers.recovery import Recovery

SETTINGS = (
    *("model=tiny", "env.id=polite_env:PoliteTalk", "env.max_turns=8", "env.eval_tasks=64"),
    *("rollout.tasks_per_step=8", "rollout.group_size=4", "rollout.max_tokens_per_turn=8"),
    *("budget.default=64", "budget.penalty=0", "temperature=constant", "ptx=none"),
    # Old tokens are weighed by how likely the weights of now make them. K2's own loss has no such weights:
    # there, staleness costs learning.
    *("objective=rloo", "objective.correction=truncated", "objective.correction_cap=2"),
    "rollout.old_tokens=correct",
    *("optimizer=adamw", "optimizer.lr=1e-3", "train.checkpoint_every=0", "train.steps=100000"),
    *("inference.max_model_len=512", "inference.max_num_seqs=32", "inference.kv_cache_gib=0.25"),
    *("warm_start.steps=50", "warm_start.demos_per_step=8", "warm_start.lr=3e-3"),
    "inference.sleep_while_training=false",
    *(
        "tracking.live=off",
        "tracking.tensorboard=false",
        "tracking.samples_per_step=0",
        "tracking.record_rollouts=false",
    ),
)
SIDES: dict[str, dict[str, Any]] = {
    "synchronous": {"surplus": "drop", "oversample": 1.0},
    "partial": {"surplus": "park", "oversample": 2.0, "max_staleness": 2},
}
#: Of the standard error to either side, for 95 %: of a normal, and of Student's t by degrees of freedom.
NORMAL, STUDENT = 1.960, (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Result(TypedDict):
    """Of one side and seed."""

    #: Mean reward of the first step.
    before: float
    #: On the held-out tasks, afterwards.
    rewards: list[float]
    tokens: int
    steps: int
    seconds: float
    staleness_mean: float
    staleness_max: float
    #: Mean reward of each step.
    curve: list[float]


async def sampled(run: Run, name: str) -> list[float]:
    """Rewards on the held-out tasks, at the temperature of training."""
    temperature = run.config.temperature.start
    attempts = [
        Attempt(f"{name}-{task.id}", task.id, task, temperature, seed)
        for seed, task in enumerate(run.prepared.eval_tasks)
    ]
    return [trajectory.reward for trajectory in await run.scheduler.run(attempts)]


async def trained(run: Run, seed: int, side: str, tokens: int) -> Result:
    """Train on so many tokens, and see what came of it."""
    config = replace(run.config, seed=seed, rollout=replace(run.config.rollout, **SIDES[side]))
    ours = arm(run, config)
    done, stale, oldest, began = 0, 0.0, 0.0, time.monotonic()
    curve: list[float] = []
    while done < tokens:
        step = ours.finished_steps + 1
        rollouts, seconds = await roll_out(ours, step)
        metrics = rollout_metrics(rollouts.trajectories, seconds) | rollouts.metrics
        await learn(ours, step, rollouts, metrics)
        curve.append(metrics["reward/mean"])
        new = sum(trajectory.num_sampled for trajectory in rollouts.trajectories)
        done += new
        stale += new * metrics["rollout/staleness_mean"]
        oldest = max(oldest, metrics["rollout/staleness_max"])
    took = time.monotonic() - began
    await ours.pool.close()
    return {
        "before": curve[0],
        "rewards": await sampled(ours, f"{seed}-{side}"),
        "tokens": done,
        "steps": ours.finished_steps,
        "seconds": took,
        "staleness_mean": stale / done,
        "staleness_max": oldest,
        "curve": curve,
    }


async def train_all(prepared: Preflight, run_dir: Path, seeds: Sequence[int], tokens: int, to: Path) -> None:
    """Every training that has not been made before."""
    with closing(Recovery(run_dir, 0)) as recovery:
        async with launch.started(prepared, run_dir, None, trains=True, recovery=recovery) as run:
            await run.worker.publish()
            await launch.warm_start(run)
            start = run_dir / "start"
            # Published they are already.
            version = run.worker.version
            await run.worker.save(start)
            await run.worker.saved()
            for seed, side in product(seeds, SIDES):
                file = file_of(to, seed, side)
                if not file.exists():
                    await back_to(run, start, run.config.optimizer.lr, version)
                    result = await trained(run, seed, side, tokens)
                    file.write_text(json.dumps(result))
                    tell(seed, side, result)


def file_of(folder: Path, seed: int, side: str) -> Path:
    return folder / f"seed{seed}-{side}.json"


def tell(seed: int, side: str, result: Result) -> None:
    print(
        f"seed {seed}, {side}: {result['before']:.3f} -> {interval(result['rewards'], NORMAL)}; "
        f"{result['tokens']} tokens in {result['steps']} steps and {result['seconds']:.0f} s, "
        f"{result['staleness_mean']:.2f} steps old on average, {result['staleness_max']:.0f} at most",
        flush=True,
    )


def interval(values: Sequence[float], t: float) -> str:
    """Their mean, and its interval `t` standard errors to both sides."""
    half = t * stdev(values) / math.sqrt(len(values))
    return f"{fmean(values):.3f} [{fmean(values) - half:.3f}, {fmean(values) + half:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=6_000, help="to train on, each time")
    new = Path("outputs/benchmarks") / f"staleness-{datetime.now():%Y-%m-%d_%H-%M-%S}"
    parser.add_argument("--folder", type=Path, default=new, help="of results")
    arguments = parser.parse_args()
    if not 2 <= len(arguments.seeds) <= len(STUDENT) + 1:
        parser.error(f"from 2 to {len(STUDENT) + 1} seeds")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    prepared = preflight(compose(list(SETTINGS)))
    with closing(prepared), tempfile.TemporaryDirectory() as run_dir:
        work = train_all(prepared, Path(run_dir), arguments.seeds, arguments.tokens, arguments.folder)
        asyncio.run(work)
    finals = {
        side: [
            fmean(json.loads(file_of(arguments.folder, seed, side).read_text())["rewards"])
            for seed in arguments.seeds
        ]
        for side in SIDES
    }
    t = STUDENT[len(arguments.seeds) - 2]
    for name, values in finals.items():
        print(f"final reward of {len(values)} seeds, {name}: {interval(values, t)}")
    pairs = zip(finals["partial"], finals["synchronous"], strict=True)
    print(f"partial - synchronous, within seeds: {interval([a - b for a, b in pairs], t)}")


if __name__ == "__main__":
    main()

"""What stale tokens cost: partial rollouts with a staleness of up to 2, beside a synchronous run.

A tiny random model learns to say vowels, in episodes of a lognormal number of turns (median 2, 12 at most),
from steps of 8 groups of 4. Each seed is trained twice by the whole loop with the real vLLM, on equally many
tokens: in synchronous steps, and with twice as many groups in play, the unfinished parked (`rollout=partial`)
and all tokens trained on alike. Then 256 episodes on held-out tasks are sampled. Intervals are of 95 %: of a
mean of episodes (normal), of seeds and of the differences within seeds (Student's t).

    make bench-staleness
    make bench-staleness ARGS="--seeds 0 1 2 3 4 --tokens 100000"

Writes a file for each of the runs to outputs/benchmarks/staleness-*, or to `--folder`, where those that have
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
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import TypedDict

from k2rl import launch
from k2rl.composition import compose
from k2rl.loop import learn, roll_out, rollout_metrics
from k2rl.preflight import Preflight, preflight
from k2rl.rollouts.episode import Attempt
from k2rl.run import Run
from k2rl.workers.recovery import Recovery

SETTINGS = (
    *("model=tiny", "env.id=vowels_env:Vowels", "env.max_turns=12", "env.eval_tasks=256"),
    *("rollout.tasks_per_step=8", "rollout.group_size=4", "rollout.max_tokens_per_turn=8"),
    *("budget.default=128", "budget.penalty=0", "temperature=constant", "ptx=none", "warm_start=none"),
    *("optimizer=adamw", "optimizer.lr=2e-3", "train.checkpoint_every=0", "train.steps=100000"),
    *("inference.max_model_len=512", "inference.max_num_seqs=32", "inference.kv_cache_gib=0.25"),
    "inference.sleep_while_training=false",
    *("tracking.live=off", "tracking.tensorboard=false", "tracking.samples_per_step=0"),
)
SIDES = {
    "synchronous": ("rollout.surplus=drop", "rollout.oversample=1"),
    "partial": ("rollout.surplus=park", "rollout.oversample=2", "rollout.max_staleness=2"),
}
#: Of the standard error to either side, for 95 %: of a normal, and of Student's t by degrees of freedom.
NORMAL, STUDENT = 1.960, (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Result(TypedDict):
    """Of one side and seed."""

    before: float
    rewards: list[float]
    tokens: int
    steps: int
    seconds: float
    staleness_mean: float
    staleness_max: float


async def sampled(run: Run, name: str) -> list[float]:
    """Rewards on the held-out tasks, at the temperature of training."""
    temperature = run.config.temperature.start
    attempts = [
        Attempt(f"{name}-{task.id}", task.id, task, temperature, seed)
        for seed, task in enumerate(run.prepared.eval_tasks)
    ]
    return [trajectory.reward for trajectory in await run.scheduler.run(attempts)]


async def trained(prepared: Preflight, run_dir: Path, tokens: int) -> Result:
    """Train on so many tokens; what was before, and what came of it."""
    done, stale, oldest = 0, 0.0, 0.0
    with closing(Recovery(run_dir, 0)) as recovery:
        async with launch.started(prepared, run_dir, None, trains=True, recovery=recovery) as run:
            await run.worker.reset_optimizer(run.config.optimizer.lr)
            await run.worker.publish()
            before, began = await sampled(run, "before"), time.monotonic()
            while done < tokens:
                step = run.finished_steps + 1
                rollouts, seconds = await roll_out(run, step)
                metrics = rollout_metrics(rollouts.trajectories, seconds) | rollouts.metrics
                await learn(run, step, rollouts, metrics)
                new = sum(trajectory.num_sampled for trajectory in rollouts.trajectories)
                done += new
                stale += new * metrics["rollout/staleness_mean"]
                oldest = max(oldest, metrics["rollout/staleness_max"])
            took = time.monotonic() - began
            return {
                "before": fmean(before),
                "rewards": await sampled(run, "after"),
                "tokens": done,
                "steps": run.finished_steps,
                "seconds": took,
                "staleness_mean": stale / done,
                "staleness_max": oldest,
            }


def interval(values: Sequence[float], t: float) -> str:
    """Their mean, and its interval `t` standard errors to both sides."""
    half = t * stdev(values) / math.sqrt(len(values))
    return f"{fmean(values):.3f} [{fmean(values) - half:.3f}, {fmean(values) + half:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=16_000, help="to train on, each time")
    new = Path("outputs/benchmarks") / f"staleness-{datetime.now():%Y-%m-%d_%H-%M-%S}"
    parser.add_argument("--folder", type=Path, default=new, help="of results")
    arguments = parser.parse_args()
    if not 2 <= len(arguments.seeds) <= len(STUDENT) + 1:
        parser.error(f"from 2 to {len(STUDENT) + 1} seeds")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Result]] = {name: [] for name in SIDES}
    for seed in arguments.seeds:
        for name, side in SIDES.items():
            file = arguments.folder / f"seed{seed}-{name}.json"
            if not file.exists():
                prepared = preflight(compose([*SETTINGS, *side, f"seed={seed}"]))
                with closing(prepared), tempfile.TemporaryDirectory() as run_dir:
                    made = asyncio.run(trained(prepared, Path(run_dir), arguments.tokens))
                file.write_text(json.dumps(made))
            result: Result = json.loads(file.read_text())
            results[name].append(result)
            print(
                f"seed {seed}, {name}: {result['before']:.3f} -> {interval(result['rewards'], NORMAL)}; "
                f"{result['tokens']} tokens in {result['steps']} steps and {result['seconds']:.0f} s, "
                f"{result['staleness_mean']:.2f} steps old on average, {result['staleness_max']:.0f} at most",
                flush=True,
            )
    finals = {name: [fmean(result["rewards"]) for result in side] for name, side in results.items()}
    t = STUDENT[len(arguments.seeds) - 2]
    for name, values in finals.items():
        print(f"final reward of {len(values)} seeds, {name}: {interval(values, t)}")
    pairs = zip(finals["partial"], finals["synchronous"], strict=True)
    print(f"partial - synchronous, within seeds: {interval([a - b for a, b in pairs], t)}")


if __name__ == "__main__":
    main()

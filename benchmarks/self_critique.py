"""Whether the closed loop teaches the critic: its agreement with the verifier on held-out pairs.

A tiny random model, which a warm start has taught to answer a guest with one of eight words, learns which of
them are polite, and to judge which of two of its own answers is. A quarter of the guests are held out: pairs
of its first answers to those are the exam, the same before and after. Who is undecided (calls a tie, or
prefers whichever stands first) is half right, so that chance is 0.5. Each seed is the whole loop with the
real vLLM, from a warm start of its own.

    make bench-critic
    make bench-critic ARGS="--seeds 0 --steps 12"
    make bench-critic ARGS="--control"    beside each, from the same weights: a critic that is not trained

Writes outputs/benchmarks/self_critique-*/result.json; exits with 1 if agreement rose by less than 0.15 over
the frozen critic's, or over chance, for any seed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from arms import back_to

from k2rl import launch
from k2rl.composition import compose
from k2rl.critic import Answers, Critic, Pair
from k2rl.loop import learn, roll_out, rollout_metrics
from k2rl.preflight import Preflight, preflight
from k2rl.rollouts.pool import Pool
from k2rl.rollouts.store.sqlite import SQLiteStore
from k2rl.run import Run
from k2rl.workers.recovery import Recovery

RISE = 0.15
CHANCE = 0.5
KEPT = ("critic/", "reward/")
LAST = 3
"""Steps at the end whose rewards count together."""
SETTINGS = (
    *("model=tiny", "env.id=polite_env:Polite", "env.max_turns=1", "env.eval_tasks=8"),
    *("rubric=self_critique", "rubric.kwargs.rubrics=[correctness]", "rubric.kwargs.brief=true"),
    *("rubric.critic_examined=32", "rubric.critic_updates=16", "rubric.critic_examples=160"),
    *("rollout.tasks_per_step=120", "rollout.group_size=3", "rollout.max_tokens_per_turn=8"),
    *("budget.default=8", "budget.penalty=0", "temperature=constant", "ptx=none"),
    *("optimizer=adamw", "optimizer.lr=1e-3", "train.num_threads=1", "train.steps=100000"),
    # It has to have been asked for a judgement before, or its first ones teach it to answer guests with "A".
    *("warm_start.steps=50", "warm_start.demos_per_step=16", "warm_start.judgements=8"),
    "warm_start.lr=3e-3",
    *("inference.max_model_len=256", "inference.kv_cache_gib=0.25", "train.checkpoint_every=0"),
    *("tracking.live=off", "tracking.tensorboard=false", "tracking.record_rollouts=false"),
)


async def taught(
    run: Run, steps: int, examples: int, exam: Sequence[Pair]
) -> tuple[list[Pair], dict[str, Any]]:
    """Train, examined before and after; without an `exam` it is made of the first step's answers."""
    config = replace(run.config, rubric=replace(run.config.rubric, critic_examples=examples))
    prepared = replace(run.prepared, config=config)
    critic = Critic(prepared.rubric, prepared.chat, config)
    critic.recall([])
    pool = Pool(config, run.scheduler, run.worker, SQLiteStore(Path(":memory:")), prepared.train_tasks)
    ours = replace(run, config=config, prepared=prepared, pool=pool, critic=critic, finished_steps=0)
    curve: list[dict[str, float]] = []
    frozen = None
    for step in range(1, steps + 1):
        rollouts, seconds = await roll_out(ours, step)
        if frozen is None:
            exam = exam or [
                pair for pair in critic.pairs(rollouts.trajectories, config.seed) if pair.held_out
            ]
            frozen = await critic.asked(exam)
        metrics = rollout_metrics(rollouts.trajectories, seconds) | rollouts.metrics
        await learn(ours, step, rollouts, metrics)
        curve.append({name: value for name, value in metrics.items() if name.startswith(KEPT)})
    assert frozen is not None
    after = await critic.asked(exam)
    await pool.close()
    last = curve[-LAST:]
    biases = sorted({name for row in curve for name in row if name.startswith("critic/bias/")})
    return list(exam), {
        "pairs": len(exam),
        "frozen": told(frozen),
        "after": told(after),
        "rise": after.agreement - max(frozen.agreement, CHANCE),
        "reward_first": curve[0]["reward/component/verifier"],
        "reward": fmean(row["reward/component/verifier"] for row in last),
        **{name: [row[name] for row in curve if name in row][-1] for name in biases},
        "curve": curve,
    }


def told(answers: Answers) -> dict[str, float]:
    return {name.removeprefix("critic/"): value for name, value in answers.metrics().items()}


async def trained(prepared: Preflight, steps: int, control: bool) -> dict[str, dict[str, Any]]:
    """A seed's run, and its control."""
    with tempfile.TemporaryDirectory() as name, closing(Recovery(Path(name), 0)) as recovery:
        run_dir = Path(name)
        async with launch.started(prepared, run_dir, None, trains=True, recovery=recovery) as run:
            await run.worker.publish()
            await launch.warm_start(run)
            start, version = run_dir / "start", run.worker.version
            await run.worker.save(start)
            await run.worker.saved()
            exam, found = await taught(run, steps, run.config.rubric.critic_examples, ())
            sides = {"trained": found}
            if control:
                await back_to(run, start, run.config.optimizer.lr, version)
                _, sides["control"] = await taught(run, steps, 0, exam)
    return sides


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--control", action="store_true", help="also run with a critic that is not trained")
    parser.add_argument("overrides", nargs="*", help="of the settings, such as optimizer.lr=1e-3")
    arguments = parser.parse_args()
    folder = Path("outputs/benchmarks") / f"self_critique-{datetime.now():%Y-%m-%d_%H-%M-%S}"
    folder.mkdir(parents=True)
    found, reached = [], True
    for seed in arguments.seeds:
        began = time.monotonic()
        with closing(preflight(compose([*SETTINGS, f"seed={seed}", *arguments.overrides]))) as prepared:
            sides = asyncio.run(trained(prepared, arguments.steps, arguments.control))
        found.append({"seed": seed, "seconds": time.monotonic() - began, **sides})
        (folder / "result.json").write_text(json.dumps(found, indent=1))
        reached &= sides["trained"]["rise"] >= RISE
        for name, side in sides.items():
            print(f"seed {seed}, {name}: {_said(side)}", flush=True)
        print(f"{found[-1]['seconds']:.0f} s")
    return int(not reached)


def _said(side: dict[str, Any]) -> str:
    first, last = (
        f"{side[at]['agreement']:.3f} ({side[at]['right_share']:.0%} right, "
        f"{side[at]['undecided_share']:.0%} undecided)"
        for at in ("frozen", "after")
    )
    reward = f"{side['reward_first']:.2f} -> {side['reward']:.2f}"
    return f"agreement on {side['pairs']} pairs {first} -> {last}, rise {side['rise']:+.3f}; reward {reward}"


if __name__ == "__main__":
    sys.exit(main())

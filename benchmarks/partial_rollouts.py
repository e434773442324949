"""Trained tokens per second with partial rollouts, beside synchronous batches, on a task with a long tail.

Episodes have a lognormal number of turns (median 3, sigma 1, 40 at most), and their tool takes lognormal time
(median 0.1 s, sigma 1, 3 s at most). Both sides are the whole loop with the real vLLM and trainer in the same
processes, one after the other: steps of 8 groups of 4, of a tiny random model. A synchronous step waits for
the last of its 32 episodes; a partial one takes the first 8 groups that are over of those in play, and parks the
others. Tokens count when they are trained on, seconds are all that pass; each side's first step is left out
(parked episodes come from somewhere).

    make bench-partial
    make bench-partial ARGS="--steps 8"

Writes outputs/benchmarks/partial_rollouts-*/result.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from k2rl import launch
from k2rl.composition import compose
from k2rl.loop import learn, roll_out, rollout_metrics
from k2rl.preflight import preflight
from k2rl.rollouts.pool import Pool
from k2rl.rollouts.store.sqlite import SQLiteStore
from k2rl.run import Run
from k2rl.workers.recovery import Recovery

SETTINGS = (
    *("model=tiny", "env.id=long_tail_env:LongTail", "env.max_turns=40", "env.eval_tasks=1"),
    *("rollout.tasks_per_step=8", "rollout.group_size=4", "rollout.max_tokens_per_turn=16"),
    *("rollout.drop_uniform_groups=false", "budget.default=800", "budget.penalty=0", "temperature=constant"),
    *("inference.max_model_len=1536", "inference.max_num_seqs=64", "inference.kv_cache_gib=1"),
    *("optimizer=adamw", "optimizer.lr=1e-6", "ptx=none", "warm_start=none", "train.checkpoint_every=0"),
    *(
        "train.micro_batch_tokens=16384",
        "tracking.live=off",
        "tracking.tensorboard=false",
        "train.steps=1000",
    ),
)
SIDES: dict[str, dict[str, Any]] = {
    "synchronous": {"surplus": "drop", "oversample": 1.0},
    "partial": {"surplus": "park", "oversample": 2.0, "max_staleness": 4},
}


async def measured(run: Run, name: str, steps: int) -> dict[str, float]:
    """Steps of one side, as the loop makes them."""
    config = replace(run.config, rollout=replace(run.config.rollout, **SIDES[name]))
    pool = Pool(config, run.scheduler, run.worker, SQLiteStore(Path(":memory:")), run.prepared.train_tasks)
    side = replace(run, config=config, pool=pool)
    tokens, busy, rolled, began = 0, 0.0, 0.0, 0.0
    for number in range(steps + 1):
        if number == 1:
            began = time.monotonic()
        step = side.finished_steps + 1
        started = time.monotonic()
        rollouts, seconds = await roll_out(side, step)
        took = time.monotonic() - started
        await learn(side, step, rollouts, rollout_metrics(rollouts.trajectories, seconds) | rollouts.metrics)
        if number:
            tokens += sum(t.num_sampled for t in rollouts.trajectories)
            busy += took * rollouts.metrics["rollout/engine_busy_share"]
            rolled += took
        print(
            f"{name} {number}: rolled out {took:.1f} s, "
            + ", ".join(
                f"{key} {rollouts.metrics[f'rollout/{key}']:.2f}"
                for key in ("engine_busy_share", "parked", "resumed", "staleness_mean", "staleness_max")
            ),
            flush=True,
        )
    seconds_all = time.monotonic() - began
    await pool.close()
    run.finished_steps = side.finished_steps
    return {
        "trained_tokens": tokens,
        "seconds": seconds_all,
        "tokens_per_second": tokens / seconds_all,
        "engine_busy_share": busy / rolled,
    }


async def compared(steps: int, run_dir: Path) -> dict[str, dict[str, float]]:
    with closing(preflight(compose(list(SETTINGS)))) as prepared, closing(Recovery(run_dir, 0)) as recovery:
        async with launch.started(prepared, run_dir, None, trains=True, recovery=recovery) as run:
            await run.worker.publish()
            return {name: await measured(run, name, steps) for name in SIDES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as run_dir:
        result = asyncio.run(compared(steps, Path(run_dir)))
    for name, side in result.items():
        print(
            f"{name:12} {side['tokens_per_second']:8.1f} trained tokens/s "
            f"({side['trained_tokens']} in {side['seconds']:.1f} s), "
            f"engine busy {side['engine_busy_share']:.0%} of the time of rollouts"
        )
    ratio = result["partial"]["tokens_per_second"] / result["synchronous"]["tokens_per_second"]
    print(f"partial / synchronous: {ratio:.2f}")
    folder = Path("outputs/benchmarks") / f"partial_rollouts-{datetime.now():%Y-%m-%d_%H-%M-%S}"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result | {"ratio": ratio}, indent=1))


if __name__ == "__main__":
    main()

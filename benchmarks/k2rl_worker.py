"""Our side of the comparison, run by `trl_compare.py`; see there for the settings."""

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

import trl_task

from k2rl import launch
from k2rl.composition import compose
from k2rl.config import Config
from k2rl.loop import train
from k2rl.preflight import Preflight, preflight
from k2rl.run import Run
from k2rl.workers.recovery import Recovery


def settings(model_path: str, dtype: str) -> Config:
    """A run that does what TRL's side does: AdamW, no PTX, no warm start."""
    return compose(
        [
            f"model.path={model_path}",
            f"model.dtype={dtype}",
            "env.id=one_turn_env:OneTurn",
            "env.max_turns=1",
            "env.eval_tasks=1",
            f"rollout.tasks_per_step={trl_task.PROMPTS_PER_STEP}",
            f"rollout.group_size={trl_task.GROUP_SIZE}",
            f"rollout.max_tokens_per_turn={trl_task.MAX_TOKENS}",
            f"budget.default={trl_task.MAX_TOKENS}",
            "budget.penalty=0",
            "temperature=constant",
            f"temperature.start={trl_task.TEMPERATURE}",
            "optimizer=adamw",
            f"optimizer.lr={trl_task.LEARNING_RATE}",
            "ptx=none",
            "warm_start=none",
            "train.checkpoint_every=0",
            "inference.max_model_len=384",
            "tracking.live=off",
            "tracking.tensorboard=false",
        ]
    )


async def step(run: Run, drop_uniform_groups: bool) -> dict[str, float]:
    """One step of the training loop, as `k2rl train` does it."""
    run.config.rollout.drop_uniform_groups = drop_uniform_groups
    started = time.monotonic()
    run.config.train.steps = run.finished_steps + 1
    await train(run)
    seconds = time.monotonic() - started
    metrics = json.loads((run.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    samples = metrics["rollout/episodes"]
    return {
        "seconds": seconds,
        "samples": samples,
        "tokens": samples * metrics["rollout/tokens_mean"],
        "groups_trained": metrics["rollout/informative_groups"],
    }


async def serve(prepared: Preflight, run_dir: Path, stream: TextIO) -> None:
    recovery = Recovery(run_dir, max_restarts=0)
    async with launch.started(prepared, run_dir, None, trains=True, recovery=recovery) as run:
        await run.worker.publish()
        trl_task.say(stream, {"ready": True})
        # In a thread, so that the worker's heartbeats are still answered while it is TRL's turn.
        while command := await asyncio.to_thread(sys.stdin.readline):
            trl_task.say(stream, await step(run, command.strip() == trl_task.DROP_UNIFORM))


def main() -> None:
    stream = trl_task.protocol_stream()
    prepared = preflight(settings(*sys.argv[1:]))
    with tempfile.TemporaryDirectory() as run_dir:
        asyncio.run(serve(prepared, Path(run_dir), stream))


if __name__ == "__main__":
    main()

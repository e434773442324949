"""A process of a run that stands still: `python -m tests.diagnosis.stuck LOGS HOW`. It says when it does."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from k2rl.diagnosis import activity


def stand_still(*_: Any) -> NoReturn:
    sys.stdout.write("stuck\n")
    sys.stdout.flush()
    while True:
        time.sleep(60)


def sleep() -> None:
    activity.TRAINER.note("all was well")
    with activity.TRAINER.doing("policy step"), activity.TRAINER.doing("optimizer"):
        stand_still()


def train() -> None:
    """The real trainer, in a loss that never ends."""
    import k2rl.training.engine as engine_module
    from k2rl.config import ObjectiveConfig, OptimizerConfig
    from k2rl.models.hub import resolve_model
    from k2rl.training.batch import TrainSequence

    engine = engine_module.TrainEngine(
        resolve_model("tiny-qwen3"), "float32", OptimizerConfig(), 64, seed=0, num_threads=1
    )
    engine_module.build_policy_loss = lambda objective: stand_still  # type: ignore[assignment, return-value]
    sequence = TrainSequence((5, 6, 7), (False, True, True), (-1.0, -1.0), 1.0)
    engine.policy_step([[sequence]], objective=ObjectiveConfig(), temperature=1.0)


if __name__ == "__main__":
    activity.begin(Path(sys.argv[1]), "worker 7")
    thread = threading.Thread(
        target={"sleep": sleep, "train": train}[sys.argv[2]], name="trainer_0", daemon=True
    )
    thread.start()
    thread.join()

"""Two ranks train as one does: same numbers, same failures, checkpoints that either reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rank_host import RankHosts
from tiny_models import random_groups, random_texts
from torch import Tensor

from k2rl.config import ObjectiveConfig, OptimizerConfig
from k2rl.training.batch import TrainSequence
from k2rl.training.engine import TrainEngine
from k2rl.training.ranks import ALONE, Ranks

OBJECTIVE = ObjectiveConfig(tau=0.2)


@pytest.fixture(scope="module")
def hosts() -> Iterator[RankHosts]:
    both = RankHosts(2)
    yield both
    both.close()


def make_engine(ranks: Ranks, path: Path, dtype: str = "float32", **settings: Any) -> TrainEngine:
    chosen = {"optimizer": OptimizerConfig(name="adamw", lr=1e-3), "micro_batch_tokens": 48, **settings}
    return TrainEngine(path, dtype, num_threads=1, ranks=ranks, **chosen)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def masters(engine: TrainEngine) -> dict[str, Any]:
    return {name: whole(master).numpy() for name, master in engine._weights.named_masters()}


def spy_on_gradients(engine: TrainEngine) -> list[dict[str, Any]]:
    """What the optimizer is given in each step."""
    seen: list[dict[str, Any]] = []
    step = engine._optimizer.step

    def spy() -> None:
        seen.append({name: whole(m.grad).numpy() for name, m in engine._weights.named_masters()})
        step()

    engine._optimizer.step = spy
    return seen


def batch(seed: int) -> list[list[TrainSequence]]:
    """Uneven: a group that is larger than all others together."""
    return [*random_groups(seed, groups=3, size=2), *random_groups(seed + 100, groups=1, size=9)]


def train(ranks: Ranks, path: Path, dtype: str, settings: dict[str, Any]) -> dict[str, Any]:
    engine = make_engine(ranks, path, dtype, **settings)
    gradients = spy_on_gradients(engine)
    metrics = []
    for seed in range(3):
        texts = {"ptx_sequences": random_texts(seed, count=3), "ptx_weight": 0.3}
        metrics.append(
            engine.policy_step(batch(seed), objective=OBJECTIVE, temperature=1.1, updates=2, **texts)
        )
    metrics.append(engine.policy_step([batch(9)[0][:1]], objective=OBJECTIVE, temperature=1.0))
    metrics.append(engine.sft_step(random_texts(7, count=1)))
    metrics.append(engine.sft_step(random_texts(8, count=5)))
    scored = engine.logprobs([[5, 6, 7], [5], [9, 8, 7, 6, 5], [5, 6]], temperature=1.2)
    result = {"metrics": metrics, "gradients": gradients, "masters": masters(engine), "scored": scored}
    engine.close()
    return result


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    # A prompt that two ranks compute counts twice.
    return {name: value for name, value in metrics.items() if not name.endswith("_s") and name != "positions"}


@pytest.mark.parametrize("optimizer", ["adamw"])
def test_two_ranks_train_as_one(hosts: RankHosts, model_path: Path, optimizer: str) -> None:
    settings = {"optimizer": OptimizerConfig(name=optimizer, lr=1e-3)}
    one, other = hosts.run(train, model_path, "float32", settings)
    alone = train(ALONE, model_path, "float32", settings)
    for mine, theirs, expected in zip(one["metrics"], other["metrics"], alone["metrics"], strict=True):
        assert mine == theirs
        assert untimed(mine) == pytest.approx(untimed(expected), rel=1e-3, abs=1e-6)
    first, reference = one["gradients"][0], alone["gradients"][0]
    scale = max(abs(gradient).max() for gradient in reference.values())
    for name, gradient in reference.items():
        assert abs(gradient - first[name]).max() < 1e-6 * scale, name
    for name, weights in alone["masters"].items():
        assert abs(weights - one["masters"][name]).max() < 1e-5, name
    assert one["scored"] == other["scored"]
    for mine, expected in zip(one["scored"], alone["scored"], strict=True):
        assert mine == pytest.approx(expected, abs=1e-4)

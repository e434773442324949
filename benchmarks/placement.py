"""How long a live vLLM takes to put weights in place: through its loaders, and as recorded copies.

    python -m benchmarks.placement [--model smollm2-135m] [--dtype bfloat16] [--rounds 5]

In turn on the same engine, with the same tensors in memory: vLLM's reload as it is, the first update, which
is recorded on its way through the loaders, and one that replays the record. Prints the seconds of each
round, the medians, and the ratio of the first to the last. Nothing else may run: on few cores, threads that
wait for one another take many times as long beside another process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from k2rl.checkpoint_engine.disk import CheckpointSource
from k2rl.models.hub import resolve_model

Weights = list[tuple[str, torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    path = resolve_model(arguments.model)
    weights = read(path, arguments.dtype)
    nbytes = sum(tensor.nbytes for _, tensor in weights)

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    engine = LLM(
        str(path),
        dtype=arguments.dtype,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=512,
        kv_cache_memory_bytes=2**28,
    )
    (rounds,) = engine.collective_rpc(_rounds, args=(weights, arguments.rounds))
    print(f"{arguments.model} {arguments.dtype}: {len(weights)} tensors, {nbytes / 1e6:.0f} MB")
    for number, seconds in enumerate(rounds, 1):
        print(f"  round {number}: {_line(*seconds)}")
    medians = [statistics.median(seconds) for seconds in zip(*rounds, strict=True)]
    print(f"median:    {_line(*medians)}, ratio {medians[0] / medians[2]:.2f}")


def read(folder: Path, dtype: str) -> Weights:
    """A checkpoint's tensors."""
    weights = []
    with CheckpointSource(folder, dtype) as source:
        for index, spec in enumerate(source.tensors):
            tensor = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
            source.write(index, 0, spec.rows, tensor.view(-1).view(torch.uint8).numpy().data)
            weights.append((spec.name, tensor))
    return weights


def _line(loaders: float, recorded: float, replayed: float) -> str:
    return f"loaders {loaders:.3f} s, recorded {recorded:.3f} s, replayed {replayed:.3f} s"


def _rounds(worker: Any, weights: Weights, count: int) -> list[tuple[float, float, float]]:
    """Runs in vLLM's worker."""
    from vllm.config import set_current_vllm_config

    from k2rl.checkpoint_engine.placement import ModelLoader

    model, config = worker.model_runner.get_model(), worker.vllm_config.model_config

    def update(loader: ModelLoader) -> None:
        loader.begin()
        loader.load(weights)
        loader.finish()

    rounds = []
    with set_current_vllm_config(worker.vllm_config):
        for _ in range(count):
            loader = ModelLoader(model, config, worker.device)
            rounds.append(
                (
                    _seconds(lambda: _reload(model, config, weights)),
                    _seconds(lambda loader=loader: update(loader)),
                    _seconds(lambda loader=loader: update(loader)),
                )
            )
    return rounds


def _reload(model: Any, config: Any, weights: Weights) -> None:
    """vLLM's own way, and the packed copies that it leaves stale."""
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    from k2rl.checkpoint_engine.vllm_modules import prepare_reload, refresh_packed

    with torch.no_grad():
        prepare_reload(model.modules())
        initialize_layerwise_reload(model)
        model.load_weights(iter(weights))
        finalize_layerwise_reload(model, config)
        refresh_packed(model)


def _seconds(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

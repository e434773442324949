"""A process of `test_model_kinds`: real vLLM engines, updated from files, so that only placing is tried.

    python -m tests.integration.model_probe FOLDER RANKS KIND...

For each kind, FOLDER/KIND holds two sets of weights. The engine starts with the second as vLLM itself loads
it; then come the updates. Prints one line of JSON for each kind.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

FIRST, SECOND = "first", "second"
SWITCHES = 5
PROMPTS = [[5, 9, 17, 33, 60 + index] for index in range(4)]

Weights = dict[str, Any]
Answers = list[Any]


class PlacementProbe:
    """Mixed into vLLM's worker (`worker_extension_cls`)."""

    device: Any
    model_runner: Any
    vllm_config: Any

    def new_loader(self) -> None:
        """Forget what was learned: the next update takes the loaders' way."""
        from k2rl.checkpoint_engine.placement import ModelLoader

        self.loader = ModelLoader(self.model_runner.get_model(), self.vllm_config.model_config, self.device)

    def update(self, file: str, way: str) -> bool:
        """Update from a safetensors file; `way` is `whole` (in two calls) or `boxes`. Whether it replayed."""
        tensors, needs = self._begin(file)
        names = sorted(tensors, key=lambda name: name[::-1])  # mixes the layers
        if way == "boxes":
            self.loader.load_boxes(
                (name, box, tensors[name][tuple(slice(*ends) for ends in box)].contiguous())
                for name in names
                for box in needs.get(name, ())
            )
        else:
            for part in (names[::2], names[1::2]):
                self.loader.load((name, tensors[name]) for name in part)
        self._finish()
        return needs is not None

    def break_off(self, file: str) -> None:
        """Load a part of an update, and leave it there."""
        tensors, _ = self._begin(file)
        self.loader.load(list(tensors.items())[::2])

    def leave_out(self, file: str, name: str) -> str:
        """Finish an update without one tensor; the error."""
        from k2rl.checkpoint_engine.messages import TransferError

        tensors, _ = self._begin(file)
        del tensors[name]
        self.loader.load(tensors.items())
        try:
            self._finish()
        except TransferError as error:
            return str(error)
        return ""

    def needed(self) -> int:
        """Bytes that this worker reads."""
        boxes = [box for boxes in (self.loader.needs or {}).values() for box in boxes]
        return sum(_elements(box) for box in boxes) * 4

    def fill_cache(self) -> None:
        """Use all of the KV cache."""
        for cache in self.model_runner.kv_caches:
            cache.fill_(1)

    def largest_weight(self) -> float:
        """Of the middle of all parameters, that no other tensor shares a page with."""
        model = self.model_runner.get_model()
        flat = (parameter.flatten() for parameter in model.parameters() if parameter.nbytes >= 3 * 4096)
        return max((float(f[f.numel() // 2].abs()) for f in flat), default=0.0)

    def modules_with_loaders(self) -> list[str]:
        """Modules that take no recorded copies."""
        replay = self.loader._replay
        assert replay is not None
        return [replay._names[module] for module in replay._loaded_modules]

    def _begin(self, file: str) -> tuple[Weights, Any]:
        from safetensors.torch import load_file

        self.loader.begin()
        return load_file(file), self.loader.needs

    def _finish(self) -> None:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config):
            self.loader.finish()


def _elements(box: Any) -> int:
    count = 1
    for start, stop in box:
        count *= stop - start
    return count


def _try(engine: Any, folder: Path) -> dict[str, Any]:
    def update(version: str, way: str = "whole") -> list[bool]:
        return list(engine.collective_rpc("update", args=(str(folder / version / "model.safetensors"), way)))

    def without(name: str) -> str:
        file = str(folder / FIRST / "model.safetensors")
        return str(engine.collective_rpc("leave_out", args=(file, name))[0])

    found: dict[str, Any] = {"answers": {}, "replayed": {}}

    def note(step: str, version: str, way: str = "whole") -> None:
        found["replayed"][step] = update(version, way)
        found["answers"][step] = _answers(engine)

    found["fresh"] = _answers(engine)
    engine.collective_rpc("new_loader")
    note("learned", FIRST)
    note("replayed", SECOND)
    found["error of a replay"] = without("model.norm.weight")
    note("in boxes", FIRST, "boxes")
    found["with loaders"] = engine.collective_rpc("modules_with_loaders")
    found["needed"] = engine.collective_rpc("needed")
    engine.collective_rpc("break_off", args=(str(folder / FIRST / "model.safetensors"),))
    note("healed by a replay", SECOND)
    engine.collective_rpc("new_loader")
    engine.collective_rpc("break_off", args=(str(folder / SECOND / "model.safetensors"),))
    found["error while learning"] = without("model.layers.1.self_attn.o_proj.weight")
    note("healed by loaders", SECOND)
    update(FIRST)
    engine.collective_rpc("fill_cache")
    awake = engine.collective_rpc("resident_memory")
    engine.sleep(2)
    asleep = engine.collective_rpc("resident_memory")
    found["bytes given back"] = [
        before - after for (before, _), (after, _) in zip(awake, asleep, strict=True)
    ]
    found["weights asleep"] = engine.collective_rpc("largest_weight")
    engine.wake_up()
    note("after sleep", SECOND)
    found["asleep"] = []
    for _ in range(SWITCHES):
        engine.sleep(2)
        found["asleep"].append(engine.collective_rpc("resident_memory"))
        engine.wake_up()
        update(SECOND)
        _answers(engine)
    return found


def _answers(engine: Any) -> Answers:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=12, logprobs=3, detokenize=False, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in PROMPTS], greedy, use_tqdm=False)
    return [
        [
            list(output.outputs[0].token_ids),
            [{token: p.logprob for token, p in at.items()} for at in output.outputs[0].logprobs],
        ]
        for output in outputs
    ]


def main() -> None:
    folder, ranks, kinds = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    from k2rl.inference.prefork import adopt, start_server

    start_server()
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    adopt()
    for kind in kinds:
        engine = LLM(
            str(folder / kind / SECOND),
            dtype=kind.partition("@")[2] or "float32",
            tensor_parallel_size=ranks,
            worker_cls="k2rl.inference.vllm_worker.ColocatedVLLMWorker",
            worker_extension_cls="tests.integration.model_probe.PlacementProbe",
            skip_tokenizer_init=True,
            enforce_eager=True,
            enable_prefix_caching=False,
            enable_chunked_prefill=False,
            block_size=32,
            max_model_len=512,
            max_num_batched_tokens=512,
            max_num_seqs=8,
            kv_cache_memory_bytes=2**26,
        )
        found = _try(engine, folder / kind)
        sys.stdout.write(json.dumps({"kind": kind, **found}) + "\n")
        sys.stdout.flush()
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    # Before torch: one thread is enough for models this small, and several would wait for each other.
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR"}
    main()

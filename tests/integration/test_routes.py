"""Which experts vLLM says it chose, beside those of transformers for the same tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from k2rl.config import InferenceConfig
from k2rl.inference.engine import Generation, Sampling
from k2rl.inference.vllm import VLLMEngine
from k2rl.models.hub import resolve_model

pytestmark = [pytest.mark.integration, pytest.mark.slow]

LONG = [5 + (7 * index) % 400 for index in range(70)]
PROMPTS = [[*LONG, 5, index] for index in range(6)] + [[9, 17, 33 + index] for index in range(6)]


def chosen(path: Path, ids: list[int]) -> np.ndarray:
    """[positions, layers, experts a token], each layer's sorted; zero in dense ones."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found = np.zeros((len(ids), 3, 2), dtype=np.uint16)
    for layer in (1, 2):
        model.model.layers[layer].mlp.gate.register_forward_hook(
            lambda router, args, out, layer=layer: found.__setitem__((slice(None), layer), out[2].numpy())
        )
    with torch.no_grad():
        model(torch.tensor([ids]))
    return np.sort(found, -1)


def test_every_position_has_the_experts_that_computed_it() -> None:
    """In batches of different lengths, and after a request was given up."""
    path = resolve_model("tiny-deepseek")
    config = InferenceConfig(
        max_model_len=256,
        max_num_seqs=8,
        kv_cache_gib=0.125,
        return_routed_experts=True,
        engine_args={"load_format": "auto"},
    )

    async def test() -> list[Generation]:
        engine = VLLMEngine(path, "float32", (), config, seed=0)
        await asyncio.to_thread(engine.start)
        # It has loaded its weights itself.
        await engine._llm.update_weight_version("0")
        engine._fenced = False
        try:
            first = await engine.generate(PROMPTS[0], Sampling(1.0, 8, seed=1))
            given_up = asyncio.create_task(engine.generate(PROMPTS[1], Sampling(1.0, 150, seed=1)))
            await engine.generate(PROMPTS[2], Sampling(1.0, 4, seed=1))
            given_up.cancel()
            calls = (engine.generate(prompt, Sampling(1.0, 20, seed=2)) for prompt in PROMPTS)
            rest = await asyncio.gather(*calls)
            assert engine._forgotten == []
            return [first, *rest]
        finally:
            engine.shutdown()

    for prompt, generation in zip([PROMPTS[0], *PROMPTS], asyncio.run(test()), strict=True):
        ids = [*prompt, *generation.token_ids]
        told = np.frombuffer(b"".join(generation.routes), dtype=np.uint16).reshape(len(ids) - 1, 3, 2)
        assert (np.sort(told, -1) == chosen(path, ids)[:-1]).all()

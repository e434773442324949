"""Weights pushed into a live vLLM, against a plain transformers forward pass of the same weights."""

from __future__ import annotations

import asyncio
import mmap
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from k2rl.checkpoint_engine.arena import WeightArena
from k2rl.checkpoint_engine.manifest import Manifest
from k2rl.config import InferenceConfig
from k2rl.inference.engine import Generation, GenerationError, Sampling
from k2rl.inference.vllm import VLLMEngine
from k2rl.models.hub import resolve_model

pytestmark = pytest.mark.integration

PROMPTS = [[5, 9, 17, 33, 60 + index] for index in range(8)]
LIMITS = {"float32": 1e-4, "bfloat16": 0.02}


def _perturb(model: torch.nn.Module, seed: int) -> None:
    """Move every parameter by a good part of its own size: a stale one can't hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.add_(0.3 * noise * parameter.float().std().to(parameter.dtype))


@torch.no_grad()
def _gap(
    model: torch.nn.Module, prompt: list[int], generation: Generation, temperature: float
) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *generation.token_ids]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    ours = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
    return (ours - torch.tensor(generation.logprobs)).abs()


async def _mean_gap(engine: VLLMEngine, model: torch.nn.Module, temperature: float) -> float:
    sampling = Sampling(temperature, 24, seed=3)
    generations = await asyncio.gather(*(engine.generate(prompt, sampling) for prompt in PROMPTS))
    gaps = [_gap(model, prompt, g, temperature) for prompt, g in zip(PROMPTS, generations, strict=True)]
    return float(torch.cat(gaps).mean())


def _corrupt(manifest: Manifest) -> None:
    fd = os.open(manifest.path, os.O_RDWR)
    with mmap.mmap(fd, manifest.nbytes) as memory:
        memory[manifest.records[-1].offset] ^= 1
    os.close(fd)


@pytest.mark.parametrize(("name", "dtype"), [("tiny-qwen3", "float32"), ("tiny-llama-untied", "bfloat16")])
def test_pushed_weights_serve_as_a_fresh_load_would(name: str, dtype: str) -> None:
    path = resolve_model(name)
    asyncio.run(_push_and_compare(path, dtype))


async def _push_and_compare(path: Path, dtype: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    config = InferenceConfig(max_model_len=2048, max_num_seqs=16, kv_cache_gib=0.25)
    engine = VLLMEngine(path, dtype, (), config, seed=0)
    arena = WeightArena()
    try:
        with pytest.raises(RuntimeError, match="fenced"):
            await engine.generate(PROMPTS[0], Sampling(1.0, 4))

        for version in range(3):
            await engine.update_weights(arena.write(model.named_parameters(), version))
            assert await _mean_gap(engine, model, 1.0) < LIMITS[dtype]
            assert await _mean_gap(engine, model, 1.4) < LIMITS[dtype]
            _perturb(model, version)

        manifest = arena.write(model.named_parameters(), 2)
        with pytest.raises(ValueError, match="not newer"):
            await engine.update_weights(manifest)

        await _requests_live_through_an_update(engine, arena, model)
        await _an_aborted_request_is_no_turn(engine)

        manifest = arena.write(model.named_parameters(), 4)
        _corrupt(manifest)
        with pytest.raises(Exception, match="corrupted"):
            await engine.update_weights(manifest)
        with pytest.raises(RuntimeError, match="fenced"):
            await engine.generate(PROMPTS[0], Sampling(1.0, 4))
        await engine.update_weights(arena.write(model.named_parameters(), 4))
        assert await _mean_gap(engine, model, 1.0) < LIMITS[dtype]
    finally:
        engine.shutdown()


async def _requests_live_through_an_update(
    engine: VLLMEngine, arena: WeightArena, model: torch.nn.Module
) -> None:
    """Running requests are kept; their tokens know which version sampled them."""
    running = [asyncio.create_task(engine.generate(prompt, Sampling(1.0, 1500, 1))) for prompt in PROMPTS]
    # Let the requests reach the engine and sample a good number of tokens of the old version.
    await engine.generate(PROMPTS[0], Sampling(1.0, 64))
    await engine.update_weights(arena.write(model.named_parameters(), 3))
    generations = [await task for task in running]
    versions = [[version for _, version in generation.weight_spans] for generation in generations]
    assert all(spans in ([2], [2, 3]) for spans in versions)
    assert [2, 3] in versions
    for generation in generations:
        assert generation.weight_spans[0][0] == 0
        assert len(generation.logprobs) == len(generation.token_ids)


async def _an_aborted_request_is_no_turn(engine: VLLMEngine) -> None:
    aborted = asyncio.create_task(engine.generate(PROMPTS[0], Sampling(1.0, 1500, 1)))
    await engine.generate(PROMPTS[1], Sampling(1.0, 8))
    (request_id,) = engine._llm.output_processor.external_req_ids
    await engine._llm.abort(request_id)
    with pytest.raises(GenerationError, match="'abort'"):
        await aborted

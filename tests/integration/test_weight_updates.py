"""Weights pushed into a live vLLM, against a plain transformers forward pass of the same weights."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from k2rl.checkpoint_engine.manifest import ManifestError
from k2rl.checkpoint_engine.messages import Address
from k2rl.checkpoint_engine.publisher import Publisher, expected_tensors
from k2rl.checkpoint_engine.push import Invitations, PushReport
from k2rl.checkpoint_engine.sender import TensorSource
from k2rl.checkpoint_engine.transaction import PushError
from k2rl.config import CheckpointEngineConfig, InferenceConfig
from k2rl.inference.engine import EngineDeadError, Generation, GenerationError, Sampling
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


@pytest.mark.parametrize(("name", "dtype"), [("tiny-qwen3", "float32")])
def test_pushed_weights_serve_as_a_fresh_load_would(name: str, dtype: str) -> None:
    path = resolve_model(name)
    asyncio.run(_push_and_compare(path, dtype))


class Pushing:
    """A model's weights, pushed into an engine."""

    def __init__(self, model: torch.nn.Module, publisher: Publisher) -> None:
        self.model, self.publisher = model, publisher

    async def push(self, version: int) -> PushReport:
        source = TensorSource(self.model.named_parameters(), rank=0)
        return await self.publisher.publish(source, version, asyncio.to_thread)


async def _push_and_compare(path: Path, dtype: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    config = InferenceConfig(max_model_len=2048, max_num_seqs=16, kv_cache_gib=0.25)
    engine = VLLMEngine(path, dtype, (), config, seed=0)
    publisher = Publisher(engine, CheckpointEngineConfig(bucket_mib=1), expected_tensors(path, dtype))
    pushing = Pushing(model, publisher)
    try:
        await publisher.start()
        with pytest.raises(RuntimeError, match="fenced"):
            await engine.generate(PROMPTS[0], Sampling(1.0, 4))

        for version in range(3):
            report = await pushing.push(version)
            assert report.nbytes == sum(parameter.nbytes for parameter in model.parameters())
            assert await _mean_gap(engine, model, 1.0) < LIMITS[dtype]
            assert await _mean_gap(engine, model, 1.4) < LIMITS[dtype]
            _perturb(model, version)

        with pytest.raises(ValueError, match="not newer"):
            await pushing.push(2)
        await _other_weights_are_refused_before_a_byte_moves(engine, publisher, model)
        await _a_sleeping_engine_is_not_pushed_into(engine, pushing)
        await _requests_live_through_an_update(engine, pushing)
        await _an_aborted_request_is_no_turn(engine)
        await _a_corrupted_push_fences_until_the_next(engine, pushing, dtype)
        await _a_killed_engine_core_ends_the_push(engine, pushing)
    finally:
        await publisher.close()
        engine.shutdown()


async def _other_weights_are_refused_before_a_byte_moves(
    engine: VLLMEngine, publisher: Publisher, model: torch.nn.Module
) -> None:
    weights = dict(model.named_parameters())
    name, parameter = weights.popitem()
    embedding = "model.embed_tokens.weight"
    other = [(n, w.double() if n == embedding else w) for n, w in weights.items()] + [("spare", parameter)]
    listed = f"3 places: missing: {name}; extra: spare; {embedding}: sent float64"
    with pytest.raises(ManifestError, match=listed):
        await publisher.publish(TensorSource(other, rank=0), 3, asyncio.to_thread)
    assert (await engine.generate(PROMPTS[0], Sampling(1.0, 4))).weight_spans == ((0, 2),)


async def _a_sleeping_engine_is_not_pushed_into(engine: VLLMEngine, pushing: Pushing) -> None:
    await engine._llm.sleep(1)
    with pytest.raises(ValueError, match="the engine sleeps: wake it up"):
        await pushing.push(3)
    await engine._llm.wake_up()
    assert (await engine.generate(PROMPTS[0], Sampling(1.0, 4))).weight_spans == ((0, 2),)


async def _a_corrupted_push_fences_until_the_next(engine: VLLMEngine, pushing: Pushing, dtype: str) -> None:
    join = engine.join_push

    async def join_corrupted(address: Address, version: int, deadline_s: float) -> Invitations:
        arena, base = pushing.publisher.coordinator.arena.being_written
        arena.memory[base + 5] ^= 1
        return await join(address, version, deadline_s)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "join_push", join_corrupted)
        with pytest.raises(PushError, match="bucket 0 arrived corrupted"):
            await pushing.push(4)
    with pytest.raises(RuntimeError, match="fenced"):
        await engine.generate(PROMPTS[0], Sampling(1.0, 4))
    await pushing.push(4)
    assert await _mean_gap(engine, pushing.model, 1.0) < LIMITS[dtype]


async def _a_killed_engine_core_ends_the_push(engine: VLLMEngine, pushing: Pushing) -> None:
    """At once, and as what it is; version 4 is still the committed one."""
    join = engine.join_push

    async def join_and_die(address: Address, version: int, deadline_s: float) -> Invitations:
        invitations = await join(address, version, deadline_s)
        for process in psutil.Process().children(recursive=True):
            if "EngineCore" in process.name():
                process.kill()
        return invitations

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "join_push", join_and_die)
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(pushing.push(5), 60)
    assert pushing.publisher.coordinator.version == 4
    with pytest.raises(RuntimeError, match="fenced"):
        await engine.generate(PROMPTS[0], Sampling(1.0, 4))


async def _requests_live_through_an_update(engine: VLLMEngine, pushing: Pushing) -> None:
    """Running requests are kept; their tokens know which version sampled them."""
    running = [asyncio.create_task(engine.generate(prompt, Sampling(1.0, 1500, 1))) for prompt in PROMPTS]
    # Let the requests reach the engine and sample a good number of tokens of the old version.
    await engine.generate(PROMPTS[0], Sampling(1.0, 64))
    await pushing.push(3)
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

"""Adapters pushed into a live vLLM of two tensor-parallel ranks, against peft's forward pass."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from k2rl.checkpoint_engine.messages import TransferError
from k2rl.checkpoint_engine.publisher import Publisher, expected_tensors, local_rank
from k2rl.checkpoint_engine.sender import Sender
from k2rl.config import CheckpointEngineConfig, InferenceConfig, LoraConfig
from k2rl.inference.engine import Sampling
from k2rl.inference.vllm import VLLMEngine
from k2rl.models.adapters import adapter_tensors
from k2rl.models.factors import is_factor
from k2rl.models.hub import resolve_model
from k2rl.training.engine import TrainEngine

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("adapter pushes")]

PROMPTS = [[5, 9, 17, 33, 60 + index] for index in range(8)]
LIMIT = 1e-4
#: One of two fused projections (queries, keys, values), all of another, and one that is split by columns.
LORA = LoraConfig(rank=2, alpha=8, target_modules=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"])


class Live:
    """A trainer of adapters, the engine that it pushes into, and the loop that both live in."""

    def __init__(self, path: Path) -> None:
        self.runner = asyncio.Runner()
        config = InferenceConfig(
            max_model_len=256,
            max_num_seqs=16,
            kv_cache_gib=0.25,
            tensor_parallel=2,
            engine_args={"worker_extension_cls": "tests.integration.push_probe.PushProbe"},
        )
        self.engine: VLLMEngine = self.run(self._start(path, config))
        self.trainer = TrainEngine(path, "float32", num_threads=1, lora=LORA)
        expected = expected_tensors(path, "float32") | adapter_tensors(path, LORA, "float32")
        push = CheckpointEngineConfig(strategy="delta", bucket_mib=1)
        self.publisher = Publisher({"vLLM": self.engine}, push, expected)
        self.run(self.publisher.start())
        self.sender = Sender(0)
        self.version = -1

    async def _start(self, path: Path, config: InferenceConfig) -> VLLMEngine:
        options = {"adapter_scale": LORA.scale, "keeps_weights": True}
        return VLLMEngine(path, "float32", (), config, seed=0, **options).start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(asyncio.wait_for(work, 200))

    def close(self) -> None:
        self.engine.shutdown()
        self.run(self.publisher.close())
        self.runner.close()

    def nbytes(self, *, factors: bool) -> int:
        """Of the adapters, or of all else."""
        return sum(
            tensor.nbytes for name, tensor in self.trainer.named_weights() if is_factor(name) == factors
        )

    @torch.no_grad()
    def perturb(self) -> None:
        """Other factors, which change the model's weights by about their own size: a stale one would show."""
        generator = torch.Generator().manual_seed(self.version + 1)
        for _, master in self.trainer._weights.named_masters():
            master.copy_(0.1 * torch.randn(master.shape, generator=generator))

    async def push(self) -> int:
        """Push as the next version; the bytes that it took."""
        self.version += 1
        rank = local_rank(self.sender, self.trainer.weights_source(), asyncio.to_thread)
        return (await self.publisher.publish({0: rank}, self.version)).nbytes

    async def serves(self) -> None:
        """The engine samples from what peft computes in the trainer."""
        for temperature in (0.0, 1.3):
            sampling = Sampling(temperature, 16, seed=3)
            generations = await asyncio.gather(
                *(self.engine.generate(prompt, sampling) for prompt in PROMPTS)
            )
            sequences = [
                [*prompt, *generation.token_ids]
                for prompt, generation in zip(PROMPTS, generations, strict=True)
            ]
            scored = self.trainer.logprobs(sequences, temperature or 1.0)
            for prompt, generation, row in zip(PROMPTS, generations, scored, strict=True):
                assert generation.weight_spans == ((0, self.version),)
                sampled = torch.tensor(row[len(prompt) - 1 :])
                assert float((sampled - torch.tensor(generation.logprobs)).abs().max()) < LIMIT


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    live = Live(resolve_model("tiny-qwen3"))
    live.run(live.push())
    yield live
    live.close()


def test_pushes_bring_adapters_alone(live: Live) -> None:
    async def pushes() -> None:
        await live.serves()
        for _ in range(3):
            live.perturb()
            assert await live.push() == live.nbytes(factors=True) < live.nbytes(factors=False) / 20
            await live.serves()
        # Nothing has changed: a version all the same.
        assert await live.push() == 0
        await live.serves()

    live.run(pushes())


def test_an_engine_that_has_slept_needs_adapters_alone(live: Live) -> None:
    async def turns() -> None:
        for _ in range(2):
            await live.engine.sleep()
            live.perturb()
            await live.engine.wake_up()
            assert await live.push() == live.nbytes(factors=True)
            await live.serves()

    live.run(turns())


async def fails(live: Live, rank: int) -> None:
    """A push of other factors breaks off in a worker that has staged them."""
    await live.engine._llm.collective_rpc("watch", args=("raise", 0, rank))
    live.perturb()
    with pytest.raises(TransferError, match="out of luck"):
        await live.push()
    with pytest.raises(RuntimeError, match="fenced"):
        await live.engine.generate(PROMPTS[0], Sampling(1.0, 4))
    await live.engine._llm.collective_rpc("watch")


def test_a_push_that_breaks_off_is_healed_by_the_next(live: Live) -> None:
    async def trouble() -> None:
        await fails(live, rank=0)
        assert await live.push() == live.nbytes(factors=True) + live.nbytes(factors=False)
        await live.serves()
        live.perturb()
        assert await live.push() == live.nbytes(factors=True)
        await live.serves()

    live.run(trouble())


def test_a_push_that_breaks_off_leaves_the_adapters_before_it(live: Live) -> None:
    """They are in the arena, without the trainer: for this engine, or one that is started again."""

    async def trouble() -> None:
        before = {name: master.detach().clone() for name, master in live.trainer._weights.named_masters()}
        await fails(live, rank=1)
        for name, master in live.trainer._weights.named_masters():
            assert not torch.equal(master, before[name])
            master.detach().copy_(before[name])
        live.version -= 1
        await live.publisher.join("vLLM", live.engine)
        await live.serves()

    live.run(trouble())


def test_an_engine_without_the_weights_gets_everything(live: Live) -> None:
    """It refuses adapters, and the same call brings all."""

    async def losses() -> None:
        live.engine._sleep_level = 2
        await live.engine.sleep()
        live.engine._sleep_level = 1
        await live.engine.wake_up()
        live.perturb()
        assert await live.push() == live.nbytes(factors=True) + live.nbytes(factors=False)
        await live.serves()
        await live.engine._llm.collective_rpc("forget")
        live.perturb()
        assert await live.push() == live.nbytes(factors=True) + live.nbytes(factors=False)
        await live.serves()
        live.perturb()
        assert await live.push() == live.nbytes(factors=True)
        await live.serves()

    live.run(losses())

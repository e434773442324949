"""Weights pushed into live vLLM engines, against a plain transformers forward pass of the same weights.

One engine of two tensor-parallel ranks takes all of it; the tests that end engines come last.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm.utils.system_utils import kill_process_tree

import k2rl.inference.vllm
from k2rl.checkpoint_engine.manifest import ManifestError
from k2rl.checkpoint_engine.messages import RECEIVER, Peer, TransferError
from k2rl.checkpoint_engine.plan import Plan
from k2rl.checkpoint_engine.publisher import (
    Publisher,
    ReceivingEngine,
    TrainerRank,
    expected_tensors,
    local_rank,
)
from k2rl.checkpoint_engine.push import PushReport
from k2rl.checkpoint_engine.sender import Sender, TensorSource
from k2rl.checkpoint_engine.transaction import PushError
from k2rl.config import CheckpointEngineConfig, InferenceConfig
from k2rl.inference.engine import EngineDeadError, Generation, GenerationError, Sampling
from k2rl.inference.vllm import VLLMEngine
from k2rl.models.hub import resolve_model
from k2rl.workers.process import shared_memory_of
from tests.checkpoint_engine.parts import Part
from tests.integration.conftest import wait_for
from tests.integration.trainers import serve_coordinating_trainer, serve_fsdp_rank

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("weight updates")]

PROMPTS = [[5, 9, 17, 33, 60 + index] for index in range(8)]
LIMIT = 1e-4
CHOICE = (300, 7, 12, *range(400, 430))
"""Tokens to choose from: more than vLLM tells by itself."""
#: For workers that hang.
SHORT_DEADLINE_S = 2.0


def start_engine(path: Path, ranks: int) -> VLLMEngine:
    config = InferenceConfig(
        max_model_len=2048,
        max_num_seqs=16,
        kv_cache_gib=0.25,
        tensor_parallel=ranks,
        engine_args={"worker_extension_cls": "tests.integration.push_probe.PushProbe"},
    )
    engine, environment = VLLMEngine(path, "float32", (), config, seed=0), dict(os.environ)
    engine.start()
    # The trainer computes meanwhile, and native code that reads a variable while another is set crashes.
    assert dict(os.environ) == environment
    return engine


class Live:
    """A model, the engine it is pushed into, and the loop that both live in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runner = asyncio.Runner()
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.engine: VLLMEngine = self.run(self._start())
        self.version = -1
        self._sender = Sender(0)
        self._ended = False

    async def _start(self) -> VLLMEngine:
        return start_engine(self.path, 2)

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            self.engine.shutdown()

    def run(self, test: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(asyncio.wait_for(test, 200))

    @contextlib.asynccontextmanager
    async def publisher(
        self, engines: Mapping[str, ReceivingEngine] | None = None, **options: Any
    ) -> AsyncIterator[Publisher]:
        config = CheckpointEngineConfig(**{"bucket_mib": 1, **options})
        publisher = Publisher(
            engines or {"vLLM": self.engine}, config, expected_tensors(self.path, "float32")
        )
        await publisher.start()
        try:
            yield publisher
        finally:
            await publisher.close()

    async def push(self, publisher: Publisher, model: torch.nn.Module | None = None) -> PushReport:
        """Push the model as the next version."""
        self.version += 1
        return await publisher.publish({0: rank_of(model or self.model, self._sender)}, self.version)

    @property
    def nbytes(self) -> int:
        """Of the model."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def perturb(self) -> None:
        """Move every parameter by a good part of its own size: a stale one can't hide."""
        generator = torch.Generator().manual_seed(self.version + 1)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator) * parameter.std())

    async def watch(self, fault: str = "", at: int = 0, rank: int = 0) -> list[psutil.Process]:
        """See `PushProbe.watch`."""
        pids = await self.engine._llm.collective_rpc("watch", args=(fault, at, rank))
        return [psutil.Process(pid) for pid in pids]

    async def read_bytes(self) -> list[int]:
        return list(await self.engine._llm.collective_rpc("read_bytes"))

    async def serves(self, model: torch.nn.Module | None = None, engine: VLLMEngine | None = None) -> None:
        """The engine samples what transformers would, at every temperature, and greedily the same tokens."""
        for temperature in (0.0, 1.4):
            sampling = Sampling(temperature, 16, seed=3)
            choice = Sampling(0.0, 1, seed=3, allowed=CHOICE)
            asked = [(prompt, sampling) for prompt in PROMPTS] + [(PROMPTS[0], choice)]
            calls = ((engine or self.engine).generate(*each) for each in asked)
            *generations, chosen = await asyncio.gather(*calls)
            _is_choice(model or self.model, PROMPTS[0], chosen)
            gaps = []
            for prompt, generation in zip(PROMPTS, generations, strict=True):
                assert generation.weight_spans == ((0, self.version),)
                gaps.append(_gap(model or self.model, prompt, generation, temperature))
            assert float(torch.cat(gaps).mean()) < LIMIT

    async def is_fenced(self, engine: VLLMEngine | None = None) -> None:
        with pytest.raises(RuntimeError, match="fenced"):
            await (engine or self.engine).generate(PROMPTS[0], Sampling(1.0, 4))


@torch.no_grad()
def _gap(
    model: torch.nn.Module, prompt: list[int], generation: Generation, temperature: float
) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *generation.token_ids]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / (temperature or 1.0)
    if not temperature:
        assert logits.argmax(-1).tolist() == list(generation.token_ids)
    ours = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
    return (ours - torch.tensor(generation.logprobs)).abs()


@torch.no_grad()
def _is_choice(model: torch.nn.Module, prompt: list[int], generation: Generation) -> None:
    """The likeliest of `CHOICE`, with the log-probs of all of them among themselves."""
    logits = model(torch.tensor([prompt])).logits[0, -1, list(CHOICE)].float()
    assert generation.token_ids == (CHOICE[int(logits.argmax())],)
    torch.testing.assert_close(
        torch.tensor(generation.allowed_logprobs), logits.log_softmax(-1), rtol=0, atol=10 * LIMIT
    )


def rank_of(model: torch.nn.Module, sender: Sender | None = None) -> TrainerRank:
    source = TensorSource(model.named_parameters(), rank=0)
    return local_rank(sender or Sender(0), source, asyncio.to_thread)


def plan_of(publisher: Publisher) -> Plan:
    assert publisher._plan is not None
    return publisher._plan[1]


def bytes_for(plan: Plan, receiver: int) -> int:
    return sum(
        block.nbytes for bucket in plan.buckets if receiver in bucket.receivers for block in bucket.blocks
    )


def engine_cores() -> set[psutil.Process]:
    return {p for p in psutil.Process().children(recursive=True) if "EngineCore" in p.name()}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    live = Live(resolve_model("tiny-qwen3"))
    try:
        yield live
    finally:
        live.end()
        live.runner.close()


@contextlib.contextmanager
def joining(engine: VLLMEngine, act: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Do something once the engine has joined a push."""
    join = engine.join_push

    async def join_and_act(*arguments: Any) -> None:
        await join(*arguments)
        act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "join_push", join_and_act)
        yield


def test_pushed_weights_serve_as_a_fresh_load_would(live: Live) -> None:
    async def test() -> None:
        await live.is_fenced()
        async with live.publisher() as publisher:
            for _ in range(3):
                report = await live.push(publisher)
                assert report.nbytes == live.nbytes
                await live.serves()
                live.perturb()
            with pytest.raises(ValueError, match="not newer"):
                await publisher.publish({0: rank_of(live.model)}, live.version)

    live.run(test())


def test_other_weights_are_refused_before_a_byte_moves(live: Live) -> None:
    async def test() -> None:
        async with live.publisher() as publisher:
            await live.push(publisher)
            weights = dict(live.model.named_parameters())
            name, parameter = weights.popitem()
            embedding = "model.embed_tokens.weight"
            other = [(n, w.double() if n == embedding else w) for n, w in weights.items()]
            source = TensorSource([*other, ("spare", parameter)], rank=0)
            rank = local_rank(Sender(0), source, asyncio.to_thread)
            listed = f"3 places: missing: {name}; extra: spare; {embedding}: sent float64"
            with pytest.raises(ManifestError, match=listed):
                await publisher.publish({0: rank}, live.version + 1)
            await live.serves()

    live.run(test())


def test_a_sleeping_engine_is_not_pushed_into(live: Live) -> None:
    async def test() -> None:
        async with live.publisher() as publisher:
            await live.push(publisher)
            await live.engine._llm.sleep(1)
            with pytest.raises(ValueError, match="vLLM: the engine sleeps: wake it up"):
                await publisher.publish({0: rank_of(live.model)}, live.version + 1)
            await live.engine._llm.wake_up()
            await live.serves()

    live.run(test())


def test_requests_live_through_an_update(live: Live) -> None:
    """Running requests are kept; their tokens know which version sampled them."""

    async def test() -> None:
        async with live.publisher() as publisher:
            await live.push(publisher)
            before = live.version
            sampling = Sampling(1.0, 400, 1)
            running = [asyncio.create_task(live.engine.generate(prompt, sampling)) for prompt in PROMPTS]
            # Let the requests reach the engine and sample a good number of tokens of the old version.
            await live.engine.generate(PROMPTS[0], Sampling(1.0, 16))
            live.perturb()
            await live.push(publisher)
            generations = [await task for task in running]
        versions = [[version for _, version in generation.weight_spans] for generation in generations]
        assert all(spans in ([before], [before, before + 1]) for spans in versions)
        assert [before, before + 1] in versions
        for generation in generations:
            assert generation.weight_spans[0][0] == 0
            assert len(generation.logprobs) == len(generation.token_ids)

    live.run(test())


def test_an_aborted_request_is_no_turn(live: Live) -> None:
    async def test() -> None:
        async with live.publisher() as publisher:
            await live.push(publisher)
        aborted = asyncio.create_task(live.engine.generate(PROMPTS[0], Sampling(1.0, 1500, 1)))
        await live.engine.generate(PROMPTS[1], Sampling(1.0, 8))
        (request_id,) = live.engine._llm.output_processor.external_req_ids
        await live.engine._llm.abort(request_id)
        with pytest.raises(GenerationError, match="'abort'"):
            await aborted

    live.run(test())


def test_requests_are_aborted_by_choice(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with live.publisher() as publisher:
            await live.push(publisher)
            monkeypatch.setattr(live.engine, "_running_requests", "abort")
            running = asyncio.create_task(live.engine.generate(PROMPTS[0], Sampling(1.0, 1500, 1)))
            await live.engine.generate(PROMPTS[1], Sampling(1.0, 8))
            live.perturb()
            await live.push(publisher)
            with pytest.raises(GenerationError, match="'abort'"):
                await running
            await live.serves()

    live.run(test())


def test_each_worker_gets_only_what_it_needs(live: Live) -> None:
    """And the same comes of it as of a broadcast."""

    async def answers() -> list[Generation]:
        calls = (live.engine.generate(prompt, Sampling(0.0, 24)) for prompt in PROMPTS)
        return [
            Generation(g.token_ids, g.logprobs, (), g.finish_reason) for g in await asyncio.gather(*calls)
        ]

    async def test() -> None:
        whole = live.nbytes
        async with live.publisher() as publisher:
            await live.watch()
            await live.push(publisher)
            assert await live.read_bytes() == [whole, whole]
        live.perturb()
        async with live.publisher(strategy="shard_aware") as publisher:
            await live.watch()
            report = await live.push(publisher)
            plan, read = plan_of(publisher), await live.read_bytes()
            assert plan.strategy == "shard_aware"
            assert report.nbytes == plan.nbytes < whole + 2**16
            assert read == [bytes_for(plan, receiver) for receiver in (0, 1)]
            assert all(whole / 2 < nbytes < 0.75 * whole for nbytes in read)
            await live.serves()
            of_shares = await answers()
        async with live.publisher() as publisher:
            await live.push(publisher)
            assert plan_of(publisher).strategy == "broadcast"
            await live.serves()
            assert await answers() == of_shares

    live.run(test())


def test_an_engine_that_knows_nothing_joins_at_a_version_in_shares_without_the_trainer(live: Live) -> None:
    async def test() -> None:
        async with live.publisher(strategy="shard_aware") as publisher:
            await live.push(publisher)
            committed = live.version
            assert plan_of(publisher).strategy == "shard_aware"
            await live.watch("raise")
            with pytest.raises(PushError, match="vLLM: receiver 0 failed: RuntimeError: out of luck"):
                await live.push(publisher)
            await live.engine._llm.collective_rpc("forget")
            await live.watch()
            assert (await publisher.join("vLLM", live.engine)).version == committed
            live.version = committed
            await live.serves()

    live.run(test())


@pytest.mark.parametrize("knows", [True, False], ids=["replayed", "learned"])
def test_a_ring_of_buckets_brings_whole_versions(live: Live, knows: bool) -> None:
    """Also the version after one that failed half-way, and also the first that an engine sees."""

    async def test() -> None:
        async with live.publisher(strategy="shard_aware", memory_mib=1) as publisher:
            if not knows:
                await live.engine._llm.collective_rpc("forget")
                live.engine._needs = None
            live.perturb()
            await live.watch("raise", at=4, rank=1)
            with pytest.raises(PushError, match="vLLM: receiver 1 failed: RuntimeError: out of luck"):
                await live.push(publisher)
            plan = plan_of(publisher)
            assert plan.strategy == ("shard_aware" if knows else "broadcast")
            assert len(plan.buckets) > 2 * plan.slots > 0
            assert plan.arena_bytes <= 2**20
            await live.is_fenced()
            for _ in range(2):
                await live.watch()
                await live.push(publisher)
                await live.serves()
                live.perturb()
            assert plan_of(publisher).strategy == "shard_aware"

    live.run(test())


def test_a_delta_brings_what_has_changed(live: Live) -> None:
    """A tensor that vLLM packs with its module, and a row of one that it does not."""

    async def test() -> None:
        async with live.publisher(strategy="delta") as publisher:
            assert (await live.push(publisher)).nbytes == live.nbytes
            assert (await live.push(publisher)).nbytes == 0
            await live.serves()
            layer = live.model.model.layers[1]
            with torch.no_grad():
                layer.self_attn.o_proj.weight.mul_(-1.5)
                live.model.model.embed_tokens.weight[PROMPTS[0][0]].mul_(2)
            with pytest.raises(AssertionError):
                await live.serves()
            await live.watch()
            report = await live.push(publisher)
            assert layer.self_attn.o_proj.weight.nbytes < report.nbytes < live.nbytes / 2
            assert await live.read_bytes() == [report.nbytes, report.nbytes]
            await live.serves()

    live.run(test())


def test_a_delta_that_is_refused_becomes_a_push_of_everything(live: Live) -> None:
    """In the same call, after one that was corrupted, and requests live through both."""

    async def test() -> None:
        async with live.publisher(strategy="delta") as publisher:

            def flip() -> None:
                arena, base = publisher.coordinator.arena.being_written
                assert publisher.coordinator._push is not None
                bucket = publisher.coordinator._push.transaction.plan.buckets[0]
                arena.memory[base + bucket.offset + bucket.blocks[0].offset] ^= 1

            await live.push(publisher)
            before = live.version
            sampling = Sampling(1.0, 400, 1)
            running = [asyncio.create_task(live.engine.generate(prompt, sampling)) for prompt in PROMPTS]
            await live.engine.generate(PROMPTS[0], Sampling(1.0, 16))
            with torch.no_grad():
                live.model.model.norm.weight.mul_(1.5)
            with joining(live.engine, flip), pytest.raises(PushError, match="arrived corrupted"):
                await live.push(publisher)
            await live.is_fenced()
            # As if nobody had told it: what it builds on is torn.
            publisher._held = before, dict(publisher.engines)
            joined: list[int] = []
            with joining(live.engine, lambda: joined.append(live.version)):
                assert (await live.push(publisher)).nbytes == live.nbytes
            assert len(joined) == 2
            spans = [[version for _, version in (await task).weight_spans] for task in running]
            assert all(versions in ([before], [before, live.version]) for versions in spans)
            assert [before, live.version] in spans
            await live.serves()
            with torch.no_grad():
                live.model.model.norm.weight.mul_(0.5)
            assert 0 < (await live.push(publisher)).nbytes < live.nbytes / 2
            await live.serves()

    live.run(test())


def test_what_fsdp_trains_in_two_processes_is_served(live: Live, tmp_path: Path) -> None:
    ranks = 2
    trainers = [Part(serve_fsdp_rank, rank, ranks, tmp_path / "store", live.path) for rank in range(ranks)]

    async def all_of(job: object) -> list[Any]:
        return await asyncio.gather(*(trainer.ask(job) for trainer in trainers))

    def rank(trainer: Part, manifest: Any) -> TrainerRank:
        return TrainerRank(
            manifest,
            lambda *push: trainer.ask(("send", *push)),
            lambda *search: trainer.ask(("changes", *search)),
        )

    async def test() -> None:
        model = AutoModelForCausalLM.from_pretrained(live.path, dtype=torch.float32)
        async with live.publisher(strategy="shard_aware") as publisher:
            for _ in range(2):
                await all_of("train")
                manifests = await all_of("manifest")
                live.version += 1
                group = {i: rank(*pair) for i, pair in enumerate(zip(trainers, manifests, strict=True))}
                await publisher.publish(group, live.version)
                owners = {owner for bucket in plan_of(publisher).buckets for owner in bucket.owners}
                assert owners == {0, 1}
                whole = (await all_of("whole"))[0]
                missing, _ = model.load_state_dict(
                    {name: torch.from_numpy(array) for name, array in whole.items()}, strict=False
                )
                assert missing == ["lm_head.weight"]  # tied
                await live.serves(model)

    try:
        live.run(test())
    finally:
        for trainer in trainers:
            trainer.end()


def test_a_corrupted_push_fences_until_the_next(live: Live) -> None:
    async def test() -> None:
        async with live.publisher() as publisher:

            def flip() -> None:
                arena, base = publisher.coordinator.arena.being_written
                arena.memory[base + 5] ^= 1

            with joining(live.engine, flip), pytest.raises(PushError, match="bucket 0 arrived corrupted"):
                await live.push(publisher)
            await live.is_fenced()
            await live.push(publisher)
            await live.serves()

    live.run(test())


@pytest.mark.parametrize("reported_dead", [False, True], ids=["in time", "too late"])
def test_a_stopped_worker_is_named_and_cannot_come_back_into_the_next_push(
    live: Live, reported_dead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(k2rl.inference.vllm, "FAREWELL_S", 0.5)
    settled = live.engine.push_settled

    async def test() -> None:
        stopped = (await live.watch("stop", at=1, rank=1))[1]

        async def wake_and_settle() -> BaseException | None:
            assert stopped.status() == psutil.STATUS_STOPPED
            stopped.resume()
            return await settled()

        async with live.publisher(deadline_s=SHORT_DEADLINE_S) as publisher:
            live.perturb()
            if not reported_dead:
                monkeypatch.setattr(live.engine, "push_settled", wake_and_settle)
            expected = EngineDeadError if reported_dead else PushError
            named = rf"receiver 1 \(process {stopped.pid}\) did not come to apply bucket 1 within 2 s"
            with pytest.raises(expected, match=f"^vLLM: .*{named}"):
                await live.push(publisher)
            monkeypatch.undo()
            await live.is_fenced()
            if reported_dead:
                assert not publisher.engines
                with pytest.raises(EngineDeadError, match="no engine is left"):
                    await live.push(publisher)
                stopped.resume()
                publisher.engines["vLLM"] = live.engine
            live.perturb()
            await live.push(publisher)
            await live.serves()

    live.run(test())


def test_a_killed_trainer_leaves_the_engine_fenced(live: Live) -> None:
    """Its coordinator is gone while one worker has applied everything and the other is in the middle."""

    async def test() -> None:
        workers = await live.watch("stop", at=1, rank=1)
        live.version += 1
        trainer = Part(serve_coordinating_trainer, live.path, live.version, 2, SHORT_DEADLINE_S)
        try:
            address = await asyncio.to_thread(trainer.listen)
            await live.engine.join_push(address, live.version, SHORT_DEADLINE_S)
            await asyncio.to_thread(
                wait_for, lambda: workers[1].status() == psutil.STATUS_STOPPED, "the worker stops", 30
            )
        finally:
            trainer.end()
        workers[1].resume()
        outcome = await live.engine.push_settled()
        assert isinstance(outcome, TransferError)
        assert "receiver 0: TransferError: the coordinator" in str(outcome)
        assert "receiver 1: TransferError: the coordinator" in str(outcome)
        await live.is_fenced()
        async with live.publisher() as publisher:
            await live.push(publisher)
            await live.serves()

    live.run(test())


def test_the_death_of_one_engine_is_named_and_the_others_go_on(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what replaces it joins at their version, while they generate."""

    def ends_while_looked_at(pid: int) -> None:
        kill_process_tree(pid)
        raise psutil.NoSuchProcess(pid)

    async def test() -> None:
        others = engine_cores()
        second = start_engine(live.path, 1)
        try:
            (core,) = engine_cores() - others
            engines = {"first": live.engine, "second": second}
            async with live.publisher(engines, strategy="shard_aware") as publisher:
                for known in (False, True):  # at first an engine does not know what it needs
                    await live.push(publisher)
                    plan = plan_of(publisher)
                    assert plan.receivers == (0, 1, 2)
                    assert not known or bytes_for(plan, 0) < bytes_for(plan, 2)
                    await live.serves()
                    await live.serves(engine=second)
                    live.perturb()
                committed = live.version
                died = pytest.raises(EngineDeadError, match="^second: .*engine core died")
                with joining(second, core.kill), died:
                    await live.push(publisher)
                assert publisher.coordinator.version == committed
                await live.is_fenced()
                await live.is_fenced(second)
                assert publisher.engines.keys() == {"first"}
                await live.push(publisher)
                await live.serves()
                await live.is_fenced(second)
                second.shutdown()
                second = start_engine(live.path, 1)
                paused: list[int] = []
                with joining(live.engine, lambda: paused.append(live.version)):
                    running = asyncio.create_task(live.engine.generate(PROMPTS[0], Sampling(1.0, 400, 1)))
                    assert (await publisher.join("second", second)).version == live.version
                    await live.serves(engine=second)
                    assert (await running).weight_spans == ((0, live.version),)
                assert not paused
                live.perturb()
                await live.push(publisher)
                await live.serves()
                await live.serves(engine=second)
            # Not even a core that neither ends nor can be looked at while it is killed keeps `second` here.
            monkeypatch.setattr("vllm.v1.utils.kill_process_tree", ends_while_looked_at)
            (core,) = engine_cores() - others
            core.suspend()
            sockets = second._llm.engine_core.resources
            second.shutdown()
            core.wait(30)
            assert sockets.input_socket.closed
            assert sockets.output_socket.closed
        finally:
            if not second._ended:
                second.shutdown()

    live.run(test())


@pytest.mark.slow
@pytest.mark.parametrize("when", ["between pushes", "in the middle", "stopped"])
def test_an_engine_core_that_goes_is_named_and_the_next_push_heals_the_other(live: Live, when: str) -> None:
    """Killed after one push and before the next, or after a bucket; or stopped, so that it never pauses."""

    async def test() -> None:
        others = engine_cores()
        second = start_engine(live.path, 1)
        (core,) = engine_cores() - others
        descendants = [core, *core.children(recursive=True)]
        segments = set(second._segments)
        engines = {"first": live.engine, "second": second}
        deadline_s = SHORT_DEADLINE_S if when == "stopped" else 30.0
        try:
            async with live.publisher(engines, deadline_s=deadline_s) as publisher:
                await live.push(publisher)
                await live.serves(engine=second)
                if when == "stopped":
                    waiting.append(asyncio.create_task(second.generate(PROMPTS[0], Sampling(1.0, 400, 1))))
                    core.suspend()
                elif when == "in the middle":
                    (worker,) = await second._llm.collective_rpc("watch", args=("stop", 1, 0))
                    stopped = asyncio.create_task(asyncio.to_thread(_kill_once_stopped, worker, core))
                else:
                    core.kill()
                live.perturb()
                named = "it does not pause" if when == "stopped" else "engine core died|EngineCore"
                with pytest.raises(EngineDeadError, match=f"^second: .*({named})"):
                    await live.push(publisher)
                if when == "in the middle":
                    await stopped
                if when != "stopped":
                    with pytest.raises((EngineDeadError, RuntimeError), match="fenced|EngineCore|died"):
                        await second.generate(PROMPTS[0], Sampling(1.0, 4))
                await live.is_fenced()
                assert publisher.engines.keys() == {"first"}
                await live.push(publisher)
                await live.serves()
        finally:
            for process in descendants:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            second.shutdown()
        for request in waiting:  # vLLM's front end, stopped before it sees the death, would leave it waiting
            with pytest.raises(EngineDeadError):
                await asyncio.wait_for(request, 30)
        wait_for(lambda: engine_cores() == others, "the engine's processes end", 30)
        assert not [segment for segment in segments if segment.exists()]

    waiting: list[asyncio.Task[Any]] = []
    live.run(test())


def _kill_once_stopped(pid: int, core: psutil.Process) -> None:
    worker = psutil.Process(pid)
    wait_for(lambda: worker.status() == psutil.STATUS_STOPPED, "the worker stops", 60)
    core.kill()


@pytest.mark.slow
def test_nothing_grows_over_200_pushes(live: Live) -> None:
    """Memory, file descriptors, shared-memory segments: of vLLM's processes and of the trainer's."""

    async def test() -> None:
        workers = await live.watch()
        processes = [psutil.Process(), *engine_cores(), *workers]

        def usage() -> tuple[list[int], list[int], int]:
            segments = {path for process in processes for path in shared_memory_of(process.pid)}
            memory = [process.memory_full_info().uss for process in processes]
            return [process.num_fds() for process in processes], memory, len(segments)

        async with live.publisher() as publisher:
            for _ in range(20):
                await live.push(publisher)
            fds, memory, segments = usage()
            for _ in range(200):
                await live.push(publisher)
            fds_after, memory_after, segments_after = usage()
            await live.serves()
        assert fds_after == fds
        assert segments_after == segments
        assert all(after - before < 8 << 20 for before, after in zip(memory, memory_after, strict=True))

    live.run(test())


def test_a_killed_worker_is_named_and_its_engine_reported_dead(live: Live) -> None:
    async def test() -> None:
        async with live.publisher(strategy="shard_aware") as publisher:
            await live.push(publisher)
            killed = (await live.watch("kill", at=1, rank=1))[1]
            (core,) = engine_cores()
            segments.update(shared_memory_of(core.pid, killed.pid))
            named = rf"receiver 1 \(process {killed.pid}\) died"
            with pytest.raises(EngineDeadError, match=f"^vLLM: .*{named}") as caught:
                await live.push(publisher)
            assert isinstance(caught.value.__cause__, PushError)
            assert caught.value.__cause__.culprit == Peer(RECEIVER, 1)
            await live.is_fenced()
            with pytest.raises(EngineDeadError, match="no engine is left"):
                await live.push(publisher)

    segments: set[Path] = set()
    live.run(test())
    assert segments
    live.end()
    wait_for(lambda: not engine_cores(), "the engine's processes end", 30)
    assert not [segment for segment in segments if segment.exists()]
    assert not [path for path in Path("/dev/shm").iterdir() if "k2rl" in path.name]

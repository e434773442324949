"""Two ranks train as one does: same numbers, same failures, checkpoints that either reads."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_host import RankHosts
from safetensors.torch import load_file
from tiny_models import random_groups, random_texts
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from k2rl.checkpoint_engine.manifest import merge
from k2rl.checkpoint_engine.pieces import pieces_of
from k2rl.checkpoint_engine.plan import plan_push
from k2rl.config import LoraConfig, ObjectiveConfig, OptimizerConfig
from k2rl.errors import ConfigError, RunError
from k2rl.models.hub import resolve_model
from k2rl.training import export
from k2rl.training.batch import SupervisedSequence, TrainSequence
from k2rl.training.checkpoint import checkpoints, is_sound
from k2rl.training.engine import TrainEngine
from k2rl.training.loading import layers_of
from k2rl.training.ranks import ALONE, Ranks
from k2rl.training.saving import read_state
from k2rl.training.sharding import local

#: With a reference, which is state like the others.
OBJECTIVE = ObjectiveConfig(tau=0.2, kl_weight=0.1)


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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_ranks_train_as_one(hosts: RankHosts, model_path: Path, optimizer: str) -> None:
    clip = 0.1 if optimizer == "muon" and "llama" in model_path.name else 0.0
    settings = {"optimizer": OptimizerConfig(name=optimizer, lr=1e-3, qk_clip=clip)}
    one, other = hosts.run(train, model_path, "float32", settings)
    alone = train(ALONE, model_path, "float32", settings)
    for mine, theirs, expected in zip(one["metrics"], other["metrics"], alone["metrics"], strict=True):
        assert mine == theirs
        assert untimed(mine) == pytest.approx(untimed(expected), rel=1e-3, abs=1e-6)
    assert (one["metrics"][0].get("qk_clip/clipped_share", 0) > 0) == (clip > 0)
    first, reference = one["gradients"][0], alone["gradients"][0]
    scale = max(abs(gradient).max() for gradient in reference.values())
    for name, gradient in reference.items():
        assert abs(gradient - first[name]).max() < 1e-6 * scale, name
    for name, weights in alone["masters"].items():
        assert abs(weights - one["masters"][name]).max() < 1e-5, name
    assert one["scored"] == other["scored"]
    for mine, expected in zip(one["scored"], alone["scored"], strict=True):
        assert mine == pytest.approx(expected, abs=1e-4)


def published(ranks: Ranks, path: Path, dtype: str, bucket_bytes: int = 1 << 16, steps: int = 1) -> Any:
    """What a rank's source would send, as bytes; what it computes; what it holds."""
    engine = make_engine(ranks, path, dtype)
    for step in range(steps):
        engine.sft_step(random_texts(1 + step))
    source = engine.weights_source()
    plan = plan_push(merge(engine._group.gather(source.manifest)), [0], bucket_bytes=bucket_bytes)
    sent = {}
    for bucket in plan.buckets:
        memory = torch.zeros(plan.arena_bytes, dtype=torch.uint8)
        for piece in pieces_of(bucket, memory, ranks.rank):
            source.copier(plan, [piece])()
            sent[plan.tensors[piece.tensor].name, piece.box] = piece.memory.numpy().tobytes()
    scored = engine.logprobs([[5, 6, 7, 8]])
    state = {name: local(tensor).numel() for name, tensor in engine._named_state()}
    weights = {name: whole(tensor.to(getattr(torch, dtype))) for name, tensor in engine.named_weights()}
    bits = {name: weight.view(torch.uint8).numpy() for name, weight in weights.items()}
    engine.close()
    return {"sent": sent, "scored": scored, "state": state, "weights": bits}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_ranks_send_the_rows_that_training_computes_with(
    hosts: RankHosts, llama_path: Path, dtype: str
) -> None:
    one, other = hosts.run(published, llama_path, dtype)
    assert one["sent"].keys().isdisjoint(other["sent"])
    for name, bits in one["weights"].items():
        parts = sorted(
            (box, raw) for part in (one, other) for (n, box), raw in part["sent"].items() if n == name
        )
        assert b"".join(raw for _, raw in parts) == bits.tobytes(), name
    for name, size in one["state"].items():
        if "layers" in name and not name.endswith("step"):
            assert size == other["state"][name], "each has half"
    # The same model alone, with the same weights, computes the same.
    model = LlamaForCausalLM.from_pretrained(llama_path, dtype=getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        raw = torch.from_numpy(one["weights"][name])
        parameter.data = raw.view(getattr(torch, dtype)).view(parameter.shape)
    logits = model(torch.tensor([[5, 6, 7, 8]])).logits[0].float()
    expected = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor([[6], [7], [8]]))[:, 0]
    assert one["scored"][0] == pytest.approx(expected.tolist(), abs=1e-2 if dtype == "bfloat16" else 1e-5)


@pytest.fixture(scope="module")
def moe_path() -> Path:
    return resolve_model("tiny-deepseek")


def test_ranks_send_experts_whole_and_one_by_one(hosts: RankHosts, moe_path: Path) -> None:
    both = hosts.run(published, moe_path, "float32", 1 << 19, 0)
    stored = load_file(moe_path / "model.safetensors")
    assert {name for part in both for name, _ in part["sent"]} == stored.keys()
    for name, tensor in stored.items():
        owners = [part for part in both if any(sent == name for sent, _ in part["sent"])]
        parts = sorted((box, raw) for part in owners for (n, box), raw in part["sent"].items() if n == name)
        assert b"".join(raw for _, raw in parts) == tensor.numpy().tobytes(), name
        if expert := re.search(r"experts\.(\d)\.", name):
            assert owners == [both[int(expert[1]) // 4]], name


def test_save_pretrained_has_experts_one_by_one(hosts: RankHosts, moe_path: Path, tmp_path: Path) -> None:
    expected, _ = hosts.run(write_model, moe_path, tmp_path / "out", 10**6)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, torch.from_numpy(expected[name]).bfloat16()), name
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    saved = {name for file in files for name in load_file(file)}
    assert saved == load_file(moe_path / "model.safetensors").keys()


def bytes_read(ranks: Ranks, path: Path) -> int:
    read = 0
    preadv = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        count = preadv(descriptor, buffers, offset)
        read += count
        return count

    os.preadv = counting
    try:
        make_engine(ranks, path).close()
    finally:
        os.preadv = preadv
    return read


def test_a_rank_reads_its_rows_and_no_more(hosts: RankHosts, llama_path: Path) -> None:
    reads = hosts.run(bytes_read, llama_path)
    size = sum(tensor.nbytes for tensor in load_file(llama_path / "model.safetensors").values())
    assert sum(reads) == size
    assert max(reads) <= size // 2 + 4096


def fail(ranks: Ranks, path: Path) -> list[str]:
    """Calls that fail on one rank, or on all; the group goes on after each."""
    engine = make_engine(ranks, path, optimizer=OptimizerConfig(name="adamw", lr=1e-2))
    before = masters(engine)
    said = []

    def failing(work: Callable[[], object]) -> None:
        try:
            work()
        except (RunError, ValueError, ConfigError) as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            raise AssertionError("it did not fail")

    def step(groups: list[list[TrainSequence]], **options: Any) -> dict[str, float]:
        settings = {"objective": OBJECTIVE, "temperature": 1.0, **options}
        return engine.policy_step(groups, **settings)

    spoiled = [list(group) for group in batch(1)]
    victim = spoiled[1][1]
    spoiled[1][1] = replace(victim, behaviour_logprobs=(1e30, *victim.behaviour_logprobs[1:]))
    failing(lambda: step(spoiled))
    failing(lambda: step([]))
    failing(lambda: step(batch(1), temperature=0.0))
    failing(lambda: step(batch(1), objective=ObjectiveConfig(name="none")))
    failing(lambda: engine.sft_step([SupervisedSequence((5, 6), (False, False))]))
    failing(lambda: engine.logprobs([[]]))
    failing(lambda: engine.load(path))
    master = next(iter(engine._weights._masters.values()))
    if ranks.rank == 1:  # one row of one rank
        clip = engine._weights.clip_gradients

        def spoil(limit: float) -> float:
            local(master.grad)[0, 0] = math.nan
            engine._weights.clip_gradients = clip
            return clip(limit)

        engine._weights.clip_gradients = spoil
    failing(lambda: step(batch(1)))
    assert all((weights == before[name]).all() for name, weights in masters(engine).items())
    assert engine.step_count == 0
    step(batch(1))
    after = masters(engine)
    fresh = make_engine_again(engine, ranks, path)
    fresh.policy_step(batch(1), objective=OBJECTIVE, temperature=1.0)
    assert all((weights == after[name]).all() for name, weights in masters(fresh).items())
    fresh.close()
    return said


def make_engine_again(engine: TrainEngine, ranks: Ranks, path: Path) -> TrainEngine:
    """A fresh one at another address, which rank 0 finds."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = engine._group.gather(f"127.0.0.1:{free.getsockname()[1]}")[0]
    engine.close()
    again = Ranks(ranks.rank, ranks.world, address, ranks.deadline_s)
    return make_engine(again, path, optimizer=OptimizerConfig(name="adamw", lr=1e-2))


def test_what_fails_on_one_rank_fails_on_both_and_touches_nothing(hosts: RankHosts, llama_path: Path) -> None:
    one, other = hosts.run(fail, llama_path)
    assert one == other
    expected = [
        r"RunError: policy loss is inf at update 1; sequences .*g1/1",
        r"ValueError: policy_step with 0 sampled tokens",
        r"ValueError: temperature=0.0 must be greater than 0",
        r"ConfigError: objective.name",
        r"ValueError: loss: none of 1 sequences has a token to learn",
        r"ValueError: sequence '' is empty",
        r"ConfigError: .* holds no whole trainer checkpoint",
        r"RunError: gradient norm is nan at update 1 \(model.embed_tokens.weight\)",
    ]
    for message, pattern in zip(one, expected, strict=True):
        assert re.match(pattern, message), message


def step_until_it_fails(ranks: Ranks, path: Path, trouble: str) -> list[str]:
    """Rank 1 has trouble in its second pass."""
    engine = make_engine(ranks, path)
    engine.sft_step(random_texts(1))
    if ranks.rank == 1:

        def broken(*_: object, **__: object) -> None:
            if trouble == "error":
                raise MemoryError("no room\nfor this")
            os.kill(os.getpid(), signal.SIGKILL if trouble == "kill" else signal.SIGSTOP)

        list(layers_of(engine._model))[1].register_forward_pre_hook(broken)
    said = []
    for _ in range(2):  # a broken group stays so
        try:
            engine.sft_step(random_texts(1))
        except RunError as error:
            said.append(str(error))
    with contextlib.suppress(RunError):
        engine.close()
    make_engine(ALONE, path).sft_step(random_texts(1))  # this process can start anew
    return said


@pytest.mark.parametrize(
    "trouble",
    ["kill", pytest.param("hang", marks=pytest.mark.slow), pytest.param("error", marks=pytest.mark.slow)],
)
def test_a_rank_that_others_wait_for_is_named(llama_path: Path, trouble: str) -> None:
    hosts = RankHosts(2)
    try:
        hosts.start(step_until_it_fails, llama_path, trouble, deadline_s=20.0)
        said = hosts.answer(0)
        assert isinstance(said, list), said
        assert len(said) == 2
        assert said[0] == said[1]
        name = f"trainer rank 1 of 2 (process {hosts.processes[1].pid} on {socket.gethostname()})"
        if trouble == "error":
            assert said[0] == f"{name} broke off: MemoryError: no room"
            assert hosts.answer(1) == said
        else:
            assert said[0].startswith(f"{name} is gone or hangs: RuntimeError: ")
    finally:
        hosts.close()


def test_ranks_that_do_not_come_are_missed(llama_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for rank in (0, 1):
        with pytest.raises(RunError, match=rf"trainer rank {rank} of 2 did not meet .* {address} within 1 s"):
            make_engine(Ranks(rank, 2, address, deadline_s=1.0), llama_path)
    with pytest.raises(ValueError, match="need an address host:port"):
        Ranks(0, 2)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Ranks(2, 2, address)


def some_steps(engine: TrainEngine, *seeds: int) -> None:
    for seed in seeds:
        engine.policy_step(batch(seed), objective=OBJECTIVE, temperature=1.0)


def save(ranks: Ranks, path: Path, folder: Path, optimizer: str) -> dict[str, Any]:
    """Trains on while it saves; returns what it should have saved."""
    engine = make_engine(ranks, path, "bfloat16", optimizer=OptimizerConfig(name=optimizer, lr=1e-3))
    some_steps(engine, 1, 2)
    state = {name: whole(tensor).numpy() for name, tensor in engine._named_state()}
    engine.save(folder)
    some_steps(engine, 3)
    engine.saved()
    state["then"] = masters(engine)
    engine.close()
    return state


def load(ranks: Ranks, path: Path, folder: Path, optimizer: str) -> dict[str, Any]:
    engine = make_engine(ranks, path, "bfloat16", optimizer=OptimizerConfig(name=optimizer, lr=1e-3), seed=5)
    engine.load(folder)
    state = {name: whole(tensor).numpy() for name, tensor in engine._named_state()}
    some_steps(engine, 3)
    state["then"] = masters(engine)
    engine.close()
    return state


def assert_same_state(one: dict[str, Any], other: dict[str, Any], also_then: bool) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        if name != "then":
            assert (values == other[name]).all(), name
    if also_then:
        assert all((values == other["then"][name]).all() for name, values in one["then"].items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_checkpoints_of_any_number_of_ranks_are_read_by_any_other(
    hosts: RankHosts, llama_path: Path, tmp_path: Path, optimizer: str
) -> None:
    both, alone = tmp_path / "both", tmp_path / "alone"
    saved, _ = hosts.run(save, llama_path, both, optimizer)
    assert sorted(path.name for path in both.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
        "checkpoint.json",
    ]
    assert is_sound(both)
    state = read_state(both)
    assert all((state[name].numpy() == values).all() for name, values in saved.items() if name != "then")
    loaded, other = hosts.run(load, llama_path, both, optimizer)
    assert_same_state(loaded, other, also_then=True)
    assert_same_state(loaded, saved, also_then=True)
    assert_same_state(load(ALONE, llama_path, both, optimizer), saved, also_then=False)
    saved = save(ALONE, llama_path, alone, optimizer)
    loaded, _ = hosts.run(load, llama_path, alone, optimizer)
    assert_same_state(loaded, saved, also_then=False)
    assert_same_state(load(ALONE, llama_path, alone, optimizer), saved, also_then=True)


def save_and_fail(ranks: Ranks, path: Path, folder: Path, trouble: str) -> str:
    """Rank 1 cannot write its part of the second checkpoint, or dies while it does."""
    engine = make_engine(ranks, path)
    engine.save(folder / "step_000001")
    engine.saved()
    if ranks.rank == 1:

        def broken(*_: object, **__: object) -> None:
            if trouble == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device")

        torch.save = broken
    engine.save(folder / "step_000002")
    try:
        engine.saved()
    except RunError as error:
        return str(error)
    return "it did not fail"


@pytest.mark.parametrize("trouble", ["full", "kill"])
def test_a_rank_that_does_not_write_its_part_harms_no_earlier_checkpoint(
    llama_path: Path, tmp_path: Path, trouble: str
) -> None:
    hosts = RankHosts(2)
    try:
        folder = tmp_path / "checkpoints"
        hosts.start(save_and_fail, llama_path, folder, trouble, deadline_s=30.0)
        said = hosts.answer(0)
        if trouble == "full":
            assert said == "checkpoint step_000002 cannot be written: [Errno 28] No space left on device"
            assert hosts.answer(1) == said
        else:
            assert said.startswith(f"trainer rank 1 of 2 (process {hosts.processes[1].pid} on ")
        assert checkpoints(tmp_path) == [(1, folder / "step_000001")]
        assert is_sound(folder / "step_000001")
        assert [path.name for path in folder.iterdir()] == ["step_000001"]
    finally:
        hosts.close()


def write_model(ranks: Ranks, path: Path, folder: Path, file_bytes: int) -> dict[str, Any]:
    engine = make_engine(ranks, path, "bfloat16")
    engine.sft_step(random_texts(1))
    before, export.FILE_BYTES = export.FILE_BYTES, file_bytes
    try:
        engine.save_pretrained(folder)
    finally:  # this process has other tests to come
        export.FILE_BYTES = before
    weights = masters(engine)
    engine.close()
    return weights


@pytest.mark.parametrize("file_bytes", [10**9, 8000])
def test_save_pretrained_is_a_plain_checkpoint(
    hosts: RankHosts, model_path: Path, tmp_path: Path, file_bytes: int
) -> None:
    expected, _ = hosts.run(write_model, model_path, tmp_path / "out", file_bytes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert type(model).__name__ in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    loaded = dict(model.named_parameters())
    assert loaded.keys() == expected.keys()
    for name, weights in expected.items():
        assert torch.equal(loaded[name], torch.from_numpy(weights).bfloat16()), name
    files = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert max(files) < file_bytes + 4096
    assert (len(files) > 1) == (file_bytes == 8000)
    AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def train_in_phases(ranks: Ranks, path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """As a run does it: state goes between steps, and is read while it is gone."""
    engine = make_engine(ranks, path, "bfloat16", micro_batch_tokens=24, **settings)
    pushed = []
    for seed in (1, 2):
        some_steps(engine, seed)
        engine.offload()
        weights = {name: whole(weight).float().numpy() for name, weight in engine.named_weights()}
        pushed.append((weights, engine.weights_source().manifest))
        if settings["offload"] == "host":
            held = [tensor for kind, tensor in engine._state() if engine._moves(kind)]
            assert held
            assert all(tensor.untyped_storage().nbytes() == 0 for tensor in held)
        engine.reload()
    folder = Path(settings["offload_folder"]) / "checkpoint"
    engine.offload()
    engine.save(folder)
    engine.saved()
    some_steps(engine, 3)
    engine.load(folder)
    some_steps(engine, 3)
    result = {"masters": masters(engine), "pushed": pushed, "bytes": engine.state_bytes()}
    engine.close()
    return result


PLACES = [
    {"offload": "host"},
    {"offload": "file"},
    {"offload": "host", "gradients": "offload"},
    {"offload": "file", "gradients": "offload"},
    {"offload": "none", "gradients": "keep", "activation_checkpointing": True},
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_neither_places_nor_recomputation_change_a_bit(
    hosts: RankHosts, llama_path: Path, tmp_path: Path, ranks: int
) -> None:
    def run(place: dict[str, Any], number: int) -> dict[str, Any]:
        settings = {**place, "offload_folder": tmp_path / str(number)}
        if ranks == 1:
            return train_in_phases(ALONE, llama_path, settings)
        return hosts.run(train_in_phases, llama_path, settings)[0]

    expected = run({"offload": "none"}, 0)
    for number, place in enumerate(PLACES, start=1):
        result = run(place, number)
        for name, weights in expected["masters"].items():
            assert (weights == result["masters"][name]).all(), (place, name)
        for (weights, manifest), (others, same) in zip(expected["pushed"], result["pushed"], strict=True):
            assert manifest == same
            assert all((values == others[name]).all() for name, values in weights.items()), place
        assert result["bytes"] == expected["bytes"]


LORA = LoraConfig(rank=3, alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])


def train_adapters(ranks: Ranks, path: Path, folder: Path, loaded: Path | None = None) -> dict[str, Any]:
    engine = make_engine(ranks, path, lora=LORA)
    if loaded is not None:
        engine.load(loaded)
    metrics = engine.policy_step(batch(0), objective=OBJECTIVE, temperature=1.1)
    engine.sft_step(random_texts(8, count=5))
    engine.save(folder)
    engine.saved()
    engine.save_pretrained(folder.with_suffix(".model"))
    weights = {name: whole(tensor).numpy() for name, tensor in engine.named_weights()}
    result = {"metrics": metrics, "masters": masters(engine), "weights": weights}
    engine.close()
    return result


def test_two_ranks_train_adapters_as_one(hosts: RankHosts, llama_path: Path, tmp_path: Path) -> None:
    alone = train_adapters(ALONE, llama_path, tmp_path / "alone")
    both, other = hosts.run(train_adapters, llama_path, tmp_path / "both")
    assert both["metrics"] == other["metrics"]
    assert untimed(both["metrics"]) == pytest.approx(untimed(alone["metrics"]), rel=1e-3, abs=1e-6)
    assert both["masters"].keys() == alone["masters"].keys()
    assert all(".lora_" in name for name in both["masters"])
    model = LlamaForCausalLM.from_pretrained(llama_path, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert (both["weights"][name] == parameter.detach().numpy()).all(), name
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        saved, expected = (load_file(tmp_path / f"{name}.model" / file) for name in ("both", "alone"))
        assert saved.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.allclose(saved[name], tensor, atol=1e-5), name
    # Each goes on from the other's checkpoint.
    again = train_adapters(ALONE, llama_path, tmp_path / "alone again", tmp_path / "both")
    others, _ = hosts.run(train_adapters, llama_path, tmp_path / "both again", tmp_path / "alone")
    for one, two in ((alone, both), (again, others)):
        for name, weights in one["masters"].items():
            assert abs(weights - two["masters"][name]).max() < 1e-5, name

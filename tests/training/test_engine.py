"""The engine against plain per-sequence computation, and its promises about failure and repetition."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_groups, random_texts, save_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from k2rl.config import ObjectiveConfig, OptimizerConfig
from k2rl.errors import ConfigError, RunError
from k2rl.training.batch import BatchTotals, SupervisedSequence, TrainSequence
from k2rl.training.checkpoint import checkpoint_folder, checkpoints, is_sound
from k2rl.training.engine import TrainEngine
from k2rl.training.saving import read_state

OBJECTIVE = ObjectiveConfig(tau=0.2)


def make_engine(path: Path, dtype: str = "float32", **kwargs: Any) -> TrainEngine:
    settings: dict[str, Any] = {"optimizer": OptimizerConfig(lr=1e-2), "micro_batch_tokens": 64, **kwargs}
    return TrainEngine(path, dtype, num_threads=1, **settings)


def weights(engine: TrainEngine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.named_weights()}


def optimizer_state(engine: TrainEngine) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in engine._named_state() if name.startswith("optimizer/")}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def plain_logprobs(model: Any, sequence: TrainSequence | SupervisedSequence, temperature: float) -> Tensor:
    """One sequence, one forward, all logits."""
    ids = torch.tensor([sequence.token_ids])
    logprobs = torch.log_softmax(model(input_ids=ids).logits[0].float() / temperature, dim=-1)
    chosen = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return chosen[torch.tensor(sequence.label_mask[1:], dtype=torch.bool)]


def plain_policy_loss(model: Any, groups: list[list[TrainSequence]], temperature: float) -> Tensor:
    sequences = [sequence for group in groups for sequence in group]
    loss = torch.zeros(())
    for sequence in sequences:
        log_ratio = plain_logprobs(model, sequence, temperature) - torch.tensor(sequence.behaviour_logprobs)
        loss = loss + (sequence.advantage - OBJECTIVE.tau * log_ratio.sum()) ** 2
    return loss / (2 * OBJECTIVE.tau * len(sequences))


def plain_ptx_loss(model: Any, texts: list[SupervisedSequence]) -> Tensor:
    return -torch.cat([plain_logprobs(model, text, 1.0) for text in texts]).mean()


def capture_gradients(engine: TrainEngine, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What the optimizer is given, by name (before the step drops it)."""
    captured: dict[str, Tensor] = {}
    step = engine._optimizer.step

    def spy() -> None:
        for name, master in engine._weights.named_masters():
            assert master.grad is not None
            captured[name] = master.grad.clone()
        step()

    monkeypatch.setattr(engine._optimizer, "step", spy)
    return captured


def test_logprobs_equal_a_plain_forward(model_path: Path) -> None:
    engine = make_engine(model_path)
    texts = [list(sequence.token_ids) for group in random_groups(1) for sequence in group] + [[5], [5, 6]]
    model = AutoModelForCausalLM.from_pretrained(model_path)
    ours = engine.logprobs(texts, temperature=1.3)
    for text, mine in zip(texts, ours, strict=True):
        sequence = SupervisedSequence(tuple(text), (False,) + (True,) * (len(text) - 1))
        expected = plain_logprobs(model, sequence, 1.3).tolist()
        assert mine == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("micro_batch_tokens", [24, 4096])
def test_policy_gradient_equals_plain_autograd(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch_tokens: int
) -> None:
    """Packed, shared, chunked and split: still the gradient of the formula, PTX included."""
    engine = make_engine(
        model_path, micro_batch_tokens=micro_batch_tokens, optimizer=OptimizerConfig(max_grad_norm=0.0)
    )
    captured = capture_gradients(engine, monkeypatch)
    groups, texts = random_groups(2), random_texts(2)
    metrics = engine.policy_step(
        groups, objective=OBJECTIVE, temperature=1.2, ptx_sequences=texts, ptx_weight=0.5
    )
    model = AutoModelForCausalLM.from_pretrained(model_path)
    loss, ptx = plain_policy_loss(model, groups, 1.2), plain_ptx_loss(model, texts)
    (loss + 0.5 * ptx).backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["ptx_loss"] == pytest.approx(ptx.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(captured[name], parameter.grad, rtol=1e-4, atol=1e-5 * scale)


def test_clipping_scales_the_gradient(llama_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(llama_path, optimizer=OptimizerConfig(max_grad_norm=0.5))
    captured = capture_gradients(engine, monkeypatch)
    metrics = engine.policy_step(random_groups(2), objective=OBJECTIVE, temperature=1.0)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in captured.values()))
    assert metrics["grad_norm"] > 0.5
    assert norm == pytest.approx(0.5, rel=1e-4)


def test_sft_step_equals_plain_autograd(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(model_path, optimizer=OptimizerConfig(max_grad_norm=0.0))
    captured = capture_gradients(engine, monkeypatch)
    texts = random_texts(3, count=6)
    metrics = engine.sft_step(texts)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    loss = plain_ptx_loss(model, texts)
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(captured[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_nll_is_the_loss_of_an_sft_step_and_changes_nothing(llama_path: Path) -> None:
    engine, texts = make_engine(llama_path), random_texts(3, count=6)
    before = {name: weight.clone() for name, weight in engine.named_weights()}
    scored = engine.nll(texts)
    assert all(torch.equal(weight, before[name]) for name, weight in engine.named_weights())
    assert scored["tokens"] == sum(sum(text.loss_mask) for text in texts)
    assert scored["nll"] == pytest.approx(engine.sft_step(texts)["loss"], rel=1e-6)


def test_an_sft_step_takes_the_learning_rate_that_it_is_given(llama_path: Path) -> None:
    engine, texts = make_engine(llama_path), random_texts(4)
    moved = [engine.sft_step(texts, lr) for lr in (1e-3, 1e-5)]
    assert [row["lr"] for row in moved] == [1e-3, 1e-5]
    assert moved[1]["update_rms"] < 0.1 * moved[0]["update_rms"]
    assert engine.sft_step(texts)["lr"] == 1e-5


def test_sft_learns(llama_path: Path) -> None:
    engine = make_engine(llama_path, "bfloat16")
    texts = random_texts(4)
    losses = [engine.sft_step(texts)["loss"] for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]


def on_policy(engine: TrainEngine, groups: list[list[TrainSequence]]) -> list[list[TrainSequence]]:
    """The same groups with the engine's own log-probs as behaviour."""
    result = []
    for group in groups:
        scored = engine.logprobs([list(sequence.token_ids) for sequence in group])
        result.append(
            [
                replace(
                    sequence,
                    behaviour_logprobs=tuple(
                        value for value, label in zip(row, sequence.sampled_mask[1:], strict=True) if label
                    ),
                )
                for sequence, row in zip(group, scored, strict=True)
            ]
        )
    return result


def test_mismatch_is_measured_before_any_step(llama_path: Path) -> None:
    engine = make_engine(llama_path)
    groups = on_policy(engine, random_groups(5))
    metrics = engine.policy_step(groups, objective=OBJECTIVE, temperature=1.0, updates=3)
    assert metrics["logprob_gap_max"] < 1e-5
    assert metrics["ratio_min"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["regulariser"] > 1e-6, "later updates have left the behaviour policy"
    assert engine.step_count == 3


def test_policy_steps_raise_the_advantage_weighted_likelihood(llama_path: Path) -> None:
    engine = make_engine(llama_path, "bfloat16")
    groups = on_policy(engine, random_groups(6, groups=2, size=3))

    def score() -> float:
        total = 0.0
        for group in groups:
            for sequence, row in zip(group, engine.logprobs([list(s.token_ids) for s in group]), strict=True):
                chosen = [v for v, label in zip(row, sequence.sampled_mask[1:], strict=True) if label]
                total += sequence.advantage * sum(chosen)
        return total

    before = score()
    engine.policy_step(groups, objective=OBJECTIVE, temperature=1.0, updates=3)
    assert score() > before


def test_leaving_out_groups_without_signal_changes_nothing(
    llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = random_groups(7, groups=2)
    probe = make_engine(llama_path)
    silent = [[replace(s, advantage=0.0) for s in group] for group in on_policy(probe, random_groups(8, 1))]
    results = []
    tokens = sum(sum(s.sampled_mask) for group in groups + silent for s in group)
    for given, totals in ((groups + silent, None), (groups, BatchTotals(12, tokens))):
        engine = make_engine(llama_path)
        captured = capture_gradients(engine, monkeypatch)
        engine.policy_step(given, objective=OBJECTIVE, temperature=1.0, totals=totals)
        results.append(captured)
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-4, atol=1e-5)


def test_metrics_are_all_there(llama_path: Path) -> None:
    engine = make_engine(llama_path)
    metrics = engine.policy_step(random_groups(9), objective=OBJECTIVE, temperature=1.0)
    assert set(metrics) == {
        "loss",
        "ptx_loss",
        "behaviour_kl",
        "regulariser",
        "grad_norm",
        "update_rms",
        "logprob_gap_mean",
        "logprob_gap_max",
        "ratio_min",
        "ratio_max",
        "entropy",
        "tokens",
        "positions",
        "sequences",
        "lr",
        "forward_backward_s",
        "optimizer_s",
    }
    assert all(math.isfinite(value) for value in metrics.values())
    assert 0 < metrics["entropy"] < math.log(64)
    assert metrics["sequences"] == 12
    assert metrics["update_rms"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_deterministic(llama_path: Path, dtype: str) -> None:
    results = []
    for _ in range(2):
        engine = make_engine(llama_path, dtype)
        engine.policy_step(
            random_groups(10),
            objective=OBJECTIVE,
            temperature=1.1,
            ptx_sequences=random_texts(1),
            ptx_weight=0.1,
        )
        results.append(weights(engine))
    assert_same_bits(*results)


def test_small_updates_survive_in_bfloat16(llama_path: Path) -> None:
    """One update is lost in rounding, many are not: they add up in the masters."""
    engine = make_engine(llama_path, "bfloat16", optimizer=OptimizerConfig(lr=1e-5))
    start = weights(engine)
    masters = {name: master.detach().clone() for name, master in engine._weights.named_masters()}
    for _ in range(4):
        engine.sft_step(random_texts(1))
    now = weights(engine)
    name = "model.layers.0.mlp.up_proj.weight"
    moved = dict(engine._weights.named_masters())[name] - masters[name]
    assert float(moved.detach().abs().mean()) > 1e-6
    assert float((now[name] == start[name]).float().mean()) > 0.9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_named_weights_are_those_of_the_checkpoint(llama_path: Path, qwen3_path: Path, dtype: str) -> None:
    tied, untied = make_engine(llama_path, dtype), make_engine(qwen3_path, dtype)
    assert "lm_head.weight" not in dict(tied.named_weights())
    assert "lm_head.weight" in dict(untied.named_weights())
    expected = AutoModelForCausalLM.from_pretrained(qwen3_path).state_dict()
    published = dict(untied.named_weights())
    assert published.keys() == expected.keys()
    for name, tensor in published.items():
        assert str(tensor.dtype) == f"torch.{dtype}"
        assert not tensor.requires_grad
        assert torch.equal(tensor, expected[name].to(tensor.dtype))


def poison(groups: list[list[TrainSequence]]) -> list[list[TrainSequence]]:
    """One sequence whose behaviour log-prob makes its loss overflow."""
    spoiled = [list(group) for group in groups]
    victim = spoiled[1][2]
    spoiled[1][2] = replace(victim, behaviour_logprobs=(1e30, *victim.behaviour_logprobs[1:]))
    return spoiled


def break_head(engine: TrainEngine) -> None:
    """Make one token's logit infinite: log-probs of whatever is predicted become NaN."""
    engine._model.get_output_embeddings().weight.data[17] = math.inf


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_infinite_loss_touches_no_weight(llama_path: Path, dtype: str) -> None:
    engine = make_engine(llama_path, dtype)
    engine.policy_step(random_groups(11), objective=OBJECTIVE, temperature=1.0)
    before = weights(engine)
    with pytest.raises(RunError, match=r"policy loss is inf at update 2; sequences .*g1/"):
        engine.policy_step(poison(random_groups(11)), objective=OBJECTIVE, temperature=1.0)
    assert_same_bits(weights(engine), before)
    assert engine.step_count == 1
    engine.policy_step(random_groups(11), objective=OBJECTIVE, temperature=1.0)


def test_a_call_that_ended_early_leaves_no_gradient(llama_path: Path) -> None:
    silent = [SupervisedSequence((5, 6), (False, False))]
    results = []
    for spoil in (False, True):
        engine = make_engine(llama_path, "bfloat16")
        if spoil:
            with pytest.raises(ValueError, match="ptx_loss: none of 1 sequences"):
                engine.policy_step(
                    random_groups(1),
                    objective=OBJECTIVE,
                    temperature=1.0,
                    ptx_sequences=silent,
                    ptx_weight=1.0,
                )
        engine.policy_step(random_groups(2), objective=OBJECTIVE, temperature=1.0)
        results.append(weights(engine))
    assert_same_bits(*results)


def test_nan_log_probs_name_their_sequences(qwen3_path: Path) -> None:
    engine = make_engine(qwen3_path)
    break_head(engine)
    before = weights(engine)
    with pytest.raises(RunError, match=r"loss is nan at update 1; sequences text0, text1"):
        engine.sft_step(random_texts(1, count=2))
    assert_same_bits(weights(engine), before)


def test_a_nan_gradient_touches_no_weight(llama_path: Path) -> None:
    engine = make_engine(llama_path)
    before = weights(engine)
    name = "model.layers.1.mlp.up_proj.weight"
    target = dict(engine._weights.named_masters())[name]
    handle = target.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(RunError, match=rf"gradient norm is nan at update 1 \({name}\)"):
        engine.policy_step(random_groups(12), objective=OBJECTIVE, temperature=1.0)
    assert_same_bits(weights(engine), before)
    handle.remove()
    engine.policy_step(random_groups(12), objective=OBJECTIVE, temperature=1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_run_goes_on_bit_for_bit(
    llama_path: Path, tmp_path: Path, dtype: str, optimizer: str
) -> None:
    def fresh() -> TrainEngine:
        return make_engine(llama_path, dtype, optimizer=OptimizerConfig(name=optimizer, lr=1e-3))

    def step(engine: TrainEngine, seed: int) -> None:
        engine.policy_step(random_groups(seed), objective=OBJECTIVE, temperature=1.0)

    straight, first, second = fresh(), fresh(), fresh()
    step(straight, 1)
    step(straight, 2)
    step(first, 1)
    first.save(tmp_path / "ck")
    first.saved()
    second.load(tmp_path / "ck")
    assert second.step_count == 1
    step(second, 2)
    assert_same_bits(weights(second), weights(straight))
    for (_, mine), (_, reference) in zip(
        second._weights.named_masters(), straight._weights.named_masters(), strict=True
    ):
        assert torch.equal(mine, reference)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_resumed_engine_keeps_the_state_and_takes_its_own_settings(
    llama_path: Path, tmp_path: Path, name: str
) -> None:
    first = make_engine(llama_path, optimizer=OptimizerConfig(name=name, lr=1e-3))
    first.policy_step(random_groups(1), objective=OBJECTIVE, temperature=1.0)
    first.save(tmp_path / "ck")
    first.saved()
    changed = OptimizerConfig(
        name=name, lr=5e-4, momentum=0.8, betas=[0.7, 0.8], eps=1e-4, weight_decay=0.1, ns_steps=3
    )
    resumed = make_engine(llama_path, optimizer=changed)
    expected = [{**group, "params": None} for group in resumed._optimizer.param_groups]
    resumed.load(tmp_path / "ck")
    assert [{**group, "params": None} for group in resumed._optimizer.param_groups] == expected
    momenta, loaded = optimizer_state(first), optimizer_state(resumed)
    assert momenta.keys() == loaded.keys()
    assert momenta
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in momenta.items())
    metrics = resumed.policy_step(random_groups(2), objective=OBJECTIVE, temperature=1.0)
    assert metrics["lr"] == 5e-4


def test_a_disk_that_is_full_while_training_goes_on(llama_path: Path, tmp_path: Path) -> None:
    """The write fails in the background: whoever waits is told; trainer and checkpoints are well."""
    engine = make_engine(llama_path)
    older, newer = checkpoint_folder(tmp_path, 1), checkpoint_folder(tmp_path, 2)
    engine.save(older)
    engine.saved()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        engine.save(newer)
        metrics = engine.policy_step(random_groups(1), objective=OBJECTIVE, temperature=1.0)
        with pytest.raises(RunError, match=r"^checkpoint step_000002 cannot be written: .*File too large"):
            engine.saved()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert math.isfinite(metrics["loss"])
    assert [path.name for path in older.parent.iterdir()] == ["step_000001"]
    assert is_sound(older)
    engine.save(newer)
    engine.saved()
    assert checkpoints(tmp_path) == [(1, older), (2, newer)]
    assert read_state(newer)["step_count"] == 1


def test_checkpoints_of_something_else_are_refused(
    llama_path: Path, qwen3_path: Path, tmp_path: Path
) -> None:
    saving = make_engine(llama_path)
    saving.save(tmp_path / "ck")
    saving.close()
    with pytest.raises(ConfigError, match=r"another model: .* differs"):
        make_engine(qwen3_path).load(tmp_path / "ck")
    with pytest.raises(ConfigError, match=r"optimizer\.name=muon, not adamw"):
        make_engine(llama_path, optimizer=OptimizerConfig(name="adamw")).load(tmp_path / "ck")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda engine: engine.policy_step([], objective=OBJECTIVE, temperature=1.0), "0 sampled tokens"),
        (
            lambda engine: engine.policy_step(random_groups(1), objective=OBJECTIVE, temperature=0.0),
            "temperature=0",
        ),
        (lambda engine: engine.sft_step([]), "none of 0 sequences"),
        (lambda engine: engine.logprobs([[]]), "empty"),
    ],
)
def test_calls_without_sense_are_refused(
    llama_path: Path, change: Callable[[TrainEngine], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        change(make_engine(llama_path))


def test_unknown_dtype_is_refused(llama_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.dtype='float16'"):
        make_engine(llama_path, "float16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_state_in_files_changes_no_bit(optimizer: str, dtype: str, tmp_path: Path) -> None:
    path = save_model("llama", tmp_path / "model")

    def final(**where: Any) -> dict[str, Tensor]:
        settings = {"optimizer": OptimizerConfig(name=optimizer, lr=1e-2), **where}
        engine = make_engine(path, dtype, **settings)

        def rest() -> None:
            engine.offload()
            engine.reload()

        for seed in range(3):
            engine.sft_step(random_texts(seed))
            rest()
        engine.save(tmp_path / "checkpoint")
        engine.saved()
        engine.sft_step(random_texts(9))
        other = make_engine(path, dtype, **settings)
        other.load(tmp_path / "checkpoint")
        other.offload()
        other.sft_step(random_texts(9))
        assert_same_bits(weights(engine), weights(other))
        engine.reset_optimizer(1e-3)
        rest()
        engine.sft_step(random_texts(4))
        engine.offload()
        return weights(engine)

    assert_same_bits(final(), final(offload="file", offload_folder=tmp_path / "state"))
    assert list((tmp_path / "state").iterdir()) == []

"""Muon and AdamW against torch's own, step for step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from k2rl import hardware
from k2rl.config import OptimizerConfig
from k2rl.errors import ConfigError
from k2rl.optim.muon import MuonAdamW, build_optimizer, is_muon_matrix
from k2rl.optim.newton_schulz import newton_schulz, orthogonalise

SHAPES = [(16, 16), (8, 24), (24, 8), (32, 16), (16, 16)]


def parameters(shapes: list[tuple[int, ...]], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def named(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"layer.{index}.weight", parameter) for index, parameter in enumerate(params)]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("momentum", "tolerance"), [(0.5, 1e-3), (0.95, 0.04)])
def test_muon_follows_torch_muon(
    monkeypatch: pytest.MonkeyPatch, nesterov: bool, weight_decay: float, momentum: float, tolerance: float
) -> None:
    """Torch's momentum is ours times (1 - mu): one direction, but rounded to bfloat16 at another scale.

    At mu = 0.5 the scale is a power of two and the rounding is the same.
    """
    # Torch iterates in bfloat16 whatever the hardware.
    monkeypatch.setattr(hardware, "cpu_multiplies_bfloat16", lambda: True)
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    config = OptimizerConfig(lr=0.02, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    optimizer = build_optimizer(named(ours), config, config.lr)
    oracle = torch.optim.Muon(
        theirs,
        lr=0.02,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    for step in range(5):
        before = [parameter.detach().clone() for parameter in theirs]
        for mine, reference in zip(ours, before, strict=True):
            mine.data.copy_(reference)
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        oracle.step()
        for mine, reference, start in zip(ours, theirs, before, strict=True):
            gap, step_size = (mine - reference).detach().norm(), (reference - start).detach().norm()
            assert float(gap) < tolerance * float(step_size)


@pytest.mark.parametrize("nesterov", [True, False])
def test_fifty_steps_follow_torch_muon_in_float32(monkeypatch: pytest.MonkeyPatch, nesterov: bool) -> None:
    """Torch's own optimizer, its cast to bfloat16 apart; the tolerance is against the way that was gone."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.to(torch.float32, copy=True))
    monkeypatch.setattr(hardware, "cpu_multiplies_bfloat16", lambda: False)
    shapes = [*SHAPES, (64, 64), (64, 192), (192, 64), (144, 160)]
    ours, theirs = parameters(shapes), parameters(shapes)
    start = [parameter.detach().clone() for parameter in ours]
    config = OptimizerConfig(lr=0.02, nesterov=nesterov, weight_decay=0.1)
    optimizer = build_optimizer(named(ours), config, config.lr)
    oracle = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(50):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        oracle.step()
    for mine, reference, origin in zip(ours, theirs, start, strict=True):
        gap, way = (mine - reference).detach().norm(), (reference - origin).detach().norm()
        assert float(gap) <= 1e-5 * float(way)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batches_give_what_single_matrices_give(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 24), (24, 16), (8, 8), (16, 24), (8, 40), (40, 8), (7, 5)]
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    batched = orthogonalise(matrices, 5, dtype, batched=True)
    for matrix, result in zip(matrices, batched, strict=True):
        assert result.shape == matrix.shape
        alone = newton_schulz(matrix, 5, dtype)
        assert float((result - alone).norm()) <= (1e-5 if dtype == torch.float32 else 3e-2) * float(
            alone.norm()
        )


def test_adamw_follows_torch_adamw() -> None:
    shapes: list[tuple[int, ...]] = [(16, 8), (16,)]
    ours, theirs = parameters(shapes), parameters(shapes)
    config = OptimizerConfig(name="adamw", lr=1e-2, weight_decay=0.1)
    optimizer = build_optimizer(named(ours), config, config.lr)
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}]
    oracle = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        oracle.step()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-7)


def test_state_is_where_the_parameters_are() -> None:
    """The fused kernel of a GPU reads the number of steps there; stood for by a device without memory."""
    weight, bias = (nn.Parameter(torch.empty(shape, device="meta")) for shape in ((16, 8), (16,)))
    optimizer = build_optimizer([("layer.weight", weight), ("layer.bias", bias)], OptimizerConfig(), 1e-3)
    for parameter in (weight, bias):
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    assert len(state) == 4
    assert {tensor.device.type for tensor in state} == {"meta"}


def test_muon_config_gives_embeddings_and_vectors_to_adamw() -> None:
    names = ["model.embed_tokens.weight", "layers.0.q_proj.weight", "model.norm.weight", "lm_head.weight"]
    shapes: list[tuple[int, ...]] = [(32, 8), (8, 8), (8,), (32, 8)]
    params = parameters(shapes)
    optimizer = build_optimizer(zip(names, params, strict=True), OptimizerConfig(weight_decay=0.1), lr=1.0)
    by_algorithm = [(group["algorithm"], group["weight_decay"]) for group in optimizer.param_groups]
    assert by_algorithm == [("muon", 0.1), ("adamw", 0.1), ("adamw", 0.0)]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2, 1]
    assert [is_muon_matrix(name, param) for name, param in zip(names, params, strict=True)] == [
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("shape", [(64, 64), (64, 192), (192, 64)])
def test_update_rms_matches_adamw(shape: tuple[int, int]) -> None:
    """Moonlight: an update of RMS 0.2 lr whatever the shape and the gradient's scale."""
    (parameter,) = parameters([shape])
    before = parameter.detach().clone()
    optimizer = build_optimizer(named([parameter]), OptimizerConfig(), lr=1e-2)
    parameter.grad = 1e-6 * torch.randn(shape, generator=torch.Generator().manual_seed(5))
    optimizer.step()
    rms = float((parameter.detach() - before).square().mean().sqrt())
    assert rms == pytest.approx(0.2 * 1e-2, rel=0.15)


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_newton_schulz_orthogonalises(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    original = matrix.clone()
    result = newton_schulz(matrix, steps=5, dtype=dtype).float()
    assert torch.equal(matrix, original)
    singular = torch.linalg.svdvals(result)
    assert float(singular.min()) > 0.3
    assert float(singular.max()) < 1.3
    # It keeps the singular vectors: U^T X V is diagonal.
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    core = u.T @ result @ vh.T
    assert float((core - core.diag().diag()).abs().max()) < 0.06


@pytest.mark.parametrize("shape", [(24, 24), (24, 48), (96, 32)])
@pytest.mark.parametrize("rank", [4, 24])
def test_newton_schulz_in_float32_is_the_papers_iteration(shape: tuple[int, int], rank: int) -> None:
    """Long matrices take a cheaper route to the same result."""
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(size, rank, generator=generator) for size in shape)
    matrix = left @ right.T + 1e-4 * torch.randn(shape, generator=generator)
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result = newton_schulz(matrix, steps=5, dtype=torch.float32).double()
    assert float((result - x).norm() / x.norm()) < 5e-3


def test_newton_schulz_of_zero_is_zero() -> None:
    assert torch.equal(newton_schulz(torch.zeros(4, 6), steps=5).float(), torch.zeros(4, 6))


def test_zero_steps_normalise_only() -> None:
    matrix = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(newton_schulz(matrix, 0, torch.float32), matrix / matrix.norm())


def test_state_dict_round_trip_continues_bit_for_bit() -> None:
    shapes: list[tuple[int, ...]] = [(16, 8), (8,), (8, 8)]
    straight, resumed = parameters(shapes), parameters(shapes)
    first = build_optimizer(named(straight), OptimizerConfig(), lr=1e-2)
    for step in range(2):
        set_gradients(straight, step)
        first.step()
    for source, target in zip(straight, resumed, strict=True):
        target.data.copy_(source.data)
    second = build_optimizer(named(resumed), OptimizerConfig(), lr=7.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for params, optimizer in ((straight, first), (resumed, second)):
        set_gradients(params, 2)
        optimizer.step()
    for mine, reference in zip(resumed, straight, strict=True):
        assert torch.equal(mine, reference)


def test_same_gradients_give_the_same_bits() -> None:
    results = []
    for _ in range(2):
        params = parameters(SHAPES)
        optimizer = build_optimizer(named(params), OptimizerConfig(), lr=1e-2)
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        results.append([parameter.detach().clone() for parameter in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_parameters_without_gradient_stay() -> None:
    params = parameters([(8, 8), (8, 8)])
    before = [parameter.detach().clone() for parameter in params]
    optimizer = build_optimizer(named(params), OptimizerConfig(weight_decay=0.1), lr=1e-2)
    params[0].grad = torch.ones(8, 8)
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1])


def test_unknown_names_and_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.name='sgd'"):
        build_optimizer(named(parameters([(2, 2)])), OptimizerConfig(name="sgd"), lr=1.0)
    with pytest.raises(ValueError, match="matrices"):
        MuonAdamW([{"params": parameters([(2,)]), "algorithm": "muon"}])
    with pytest.raises(ValueError, match="matrix"):
        newton_schulz(torch.zeros(2), steps=5)

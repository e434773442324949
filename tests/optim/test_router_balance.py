"""Router biases: which way they move, and that they end up where experts are equally busy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from k2rl.optim.router_balance import RouterBalance

EXPERTS, TOP = 8, 2


class Router(nn.Module):
    """As DeepSeek V3's: sigmoid scores, chosen with a bias that does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, 16))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(EXPERTS))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores = (hidden @ self.weight.T).sigmoid()
        chosen = (scores + self.e_score_correction_bias).topk(TOP).indices
        return scores, scores.gather(1, chosen), chosen


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"one": Router(), "two": Router()})


def test_biases_move_by_the_rate_towards_the_idle(model: nn.Module) -> None:
    balance = RouterBalance(model, 0.01)
    metrics = balance.update(torch.tensor([[4.0, 0, 2, 2, 2, 2, 2, 2], [2.0] * 8]).double())
    assert balance.biases["one.e_score_correction_bias"].tolist() == pytest.approx([-0.01, 0.01] + [0.0] * 6)
    assert balance.biases["two.e_score_correction_bias"].tolist() == [0.0] * 8
    assert metrics == {"router/max_load": 2.0, "router/min_load": 0.0, "router/unused_share": 1 / 16}


def test_only_passes_that_make_gradients_count(model: nn.Module) -> None:
    balance, hidden = RouterBalance(model, 0.01), torch.randn(5, 16)
    with torch.no_grad():
        model["one"](hidden)  # type: ignore[index]
    assert not balance.take().any()
    *_, chosen = model["one"](hidden)  # type: ignore[index]
    model["one"](hidden)  # type: ignore[index]
    counts = balance.take()
    assert counts[0].tolist() == (2 * torch.bincount(chosen.flatten(), minlength=EXPERTS)).tolist()
    assert not counts[1].any()
    assert not balance.take().any()


def test_a_rate_of_zero_measures_and_moves_nothing(model: nn.Module) -> None:
    balance = RouterBalance(model, 0.0)
    model["one"](torch.randn(9, 16))  # type: ignore[index]
    assert balance.update(balance.take())["router/max_load"] > 1
    assert not any(bias.any() for bias in balance.biases.values())


def test_lopsided_experts_end_up_equally_busy(model: nn.Module) -> None:
    torch.manual_seed(1)
    balance, hidden = RouterBalance(model, 0.02), torch.randn(512, 16) + 0.7
    loads = []
    for _ in range(100):
        for router in model.children():
            router(hidden)
        loads.append(balance.update(balance.take())["router/max_load"])
    assert loads[0] > 1.8
    assert loads[-1] < 1.25


def test_a_model_without_routers_has_nothing_to_say() -> None:
    balance = RouterBalance(nn.Linear(2, 2), 0.1)
    assert (balance.biases, balance.update(balance.take())) == ({}, {})

"""MuonAdamW over parameters that FSDP2 has sharded: two processes against one, and checkpoints across."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from k2rl.config import OptimizerConfig
from k2rl.optim.exchange import Sharding, plan_waves
from k2rl.optim.matrices import boxes_of
from k2rl.optim.muon import MuonAdamW, build_optimizer

RANKS = 2
STEPS = 4
CONFIG = OptimizerConfig(lr=0.02, weight_decay=0.1)


class Experts(nn.Module):
    """Stacked as transformers' models hold them, of an odd number."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(count, 10, 6))
        self.down_proj = nn.Parameter(torch.randn(count, 6, 5))


class Layer(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.experts = Experts(count)

    def forward(self) -> None:
        """FSDP wants one."""


def build_model() -> nn.ModuleDict:
    """Shapes that two ranks share unevenly or not at all, fused projections, and AdamW's share."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(9, 6),
            "uneven": nn.Linear(5, 7),
            "one_row": nn.Linear(7, 1),
            "wide": nn.Linear(32, 8, bias=False),
            "gate_up_proj": nn.Linear(6, 14, bias=False),
            "norm": nn.LayerNorm(3),
            "layer": Layer(),
            "stacked": Layer(1),
            "by_rows": Layer(),
            "whole": nn.Linear(4, 4),  # left out of FSDP
        }
    )


def shard(model: nn.ModuleDict) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for name, module in model.items():
        if name == "by_rows":
            fully_shard(module, mesh=mesh, shard_placement_fn=lambda parameter: Shard(1))
        elif name != "whole":
            fully_shard(module, mesh=mesh)


def set_gradients(model: nn.Module, step: int) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    generator = torch.Generator().manual_seed(100 + step)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient


def train(model: nn.Module, optimizer: MuonAdamW, steps: range) -> None:
    for step in steps:
        set_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


def _rank(rank: int, folder: Path) -> None:
    import torch.distributed as dist

    from k2rl.optim import exchange

    torch.set_num_threads(1)
    exchange.WAVE_ELEMENTS = 40  # several waves
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    model = build_model()
    shard(model)
    optimizer = build_optimizer(model.named_parameters(), CONFIG, CONFIG.lr)
    train(model, optimizer, range(STEPS))
    assert max(len(plan.waves) for plans in optimizer._plans.values() for plan in plans) > 3
    for parameter in model.parameters():
        for value in optimizer.state[parameter].values():
            if value.ndim:  # state is sharded as its parameter is
                assert type(value) is (type(parameter.data) if hasattr(parameter, "placements") else Tensor)
                assert getattr(value, "placements", None) == getattr(parameter, "placements", None)
    weights = {name: whole(parameter) for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save(weights, folder / "weights.pt")
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder / "checkpoint")
    dist.destroy_process_group()


def test_two_ranks_do_what_one_does(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=_rank, args=(rank, tmp_path), daemon=True) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    alone = build_model()
    optimizer = build_optimizer(alone.named_parameters(), CONFIG, CONFIG.lr)
    start = {name: parameter.detach().clone() for name, parameter in alone.named_parameters()}
    train(alone, optimizer, range(STEPS))
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    together: dict[str, Tensor] = torch.load(tmp_path / "weights.pt")
    for name, parameter in alone.named_parameters():
        gap = float((together[name] - parameter).detach().norm())
        assert gap <= 1e-5 * float((parameter - start[name]).detach().norm()), name

    # Two ranks' state in one process: the next steps are those of the one that was never sharded.
    resumed = build_model()
    resumed.load_state_dict(together)
    fresh = build_optimizer(resumed.named_parameters(), CONFIG, CONFIG.lr)
    state: dict[str, Any] = get_optimizer_state_dict(resumed, fresh)
    dcp.load({"optimizer": state}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    set_optimizer_state_dict(resumed, fresh, state)
    train(alone, optimizer, range(STEPS, STEPS + 2))
    train(resumed, fresh, range(STEPS, STEPS + 2))
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(resumed.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


def test_matrices_are_spread_by_cost_and_whole_ones_stay() -> None:
    """Sixteen equal matrices cut in rows over four ranks, and experts that each rank holds whole."""
    shapes = [(64, 32)] * 16 + [(4, 48, 32)]
    shardings = [Sharding(None, 1, 4, 1)] * 16 + [Sharding(None, 1, 4, 0)]
    boxes = [boxes_of("", shape) for shape in shapes]
    waves = plan_waves(shapes, boxes, shardings, wave_elements=8192)
    matrices = [matrix for wave in waves for matrix in wave]
    assert len(matrices) == 20
    assert all(sum(m.shape[0] * m.shape[1] for m in wave) <= 4 * 8192 for wave in waves)
    workers = [matrix.worker for matrix in matrices if not matrix.is_whole]
    assert sorted(workers) == sorted([0, 1, 2, 3] * 4)
    experts = [matrix for matrix in matrices if matrix.is_whole]
    assert [(m.parameter, m.worker) for m in experts] == [(16, rank) for rank in range(4)]

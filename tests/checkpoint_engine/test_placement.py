"""`ModelLoader` on a model small enough to look into; vLLM's own: `tests/integration/test_model_kinds.py`."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from k2rl.checkpoint_engine.manifest import Manifest, TensorSpec
from k2rl.checkpoint_engine.messages import TransferError
from k2rl.checkpoint_engine.pieces import blocks_of
from k2rl.checkpoint_engine.plan import Plan, plan_push

if TYPE_CHECKING:
    from k2rl.checkpoint_engine.placement import ModelLoader
    from k2rl.checkpoint_engine.vllm_receiver import ModelTarget

# Of all test processes, the one that has imported vLLM anyway.
pytestmark = pytest.mark.xdist_group("weight updates")

RANK, RANKS = 1, 2
Weights = dict[str, torch.Tensor]


def _merged(param: torch.Tensor, weight: torch.Tensor, index: int) -> None:
    """Two projections in one parameter, of each the rows of this rank."""
    half = param.shape[0] // 2
    param.data.narrow(0, index * half, half).copy_(weight.chunk(RANKS)[RANK])


class Toy(torch.nn.Module):
    """A layer that takes copies, and one whose loader computes."""

    def __init__(self) -> None:
        from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
        from vllm.model_executor.model_loader.weight_utils import (
            composed_weight_loader,
            default_weight_loader,
        )

        super().__init__()
        self.merged, self.decay, self.head = (torch.nn.Module() for _ in range(3))
        self.merged.weight = torch.nn.Parameter(torch.zeros(8, 3), requires_grad=False)
        self.merged.weight.weight_loader = _merged
        self.decay.weight = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
        self.decay.weight.weight_loader = composed_weight_loader(default_weight_loader, lambda x: -x.exp())
        self.head.weight = torch.nn.Parameter(torch.zeros(5, 3), requires_grad=False)
        record_metadata_for_reloading(self)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        from vllm.model_executor.model_loader.weight_utils import default_weight_loader

        parameters = dict(self.named_parameters())
        for name, weight in weights:
            if name in ("gate", "up"):
                parameter = parameters["merged.weight"]
                parameter.weight_loader(parameter, weight, ("gate", "up").index(name))
            elif name in parameters:
                parameter = parameters[name]
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, weight)
        return set(parameters)


def _weights(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (8, 3), "up": (8, 3), "decay.weight": (4,), "head.weight": (5, 3), "unused": (7,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _expected(weights: Weights) -> Weights:
    return {
        "merged.weight": torch.cat([weights["gate"][4:], weights["up"][4:]]),
        "decay.weight": -weights["decay.weight"].exp(),
        "head.weight": weights["head.weight"],
    }


def _loader(model: Toy) -> ModelLoader:
    from k2rl.checkpoint_engine.placement import ModelLoader

    return ModelLoader(model, SimpleNamespace(dtype=torch.float32), torch.device("cpu"))


def _target(loader: ModelLoader) -> ModelTarget:
    from k2rl.checkpoint_engine.vllm_receiver import ModelTarget

    return ModelTarget(loader)


def _update(loader: ModelLoader, weights: Weights) -> None:
    loader.begin()
    loader.load(weights.items())
    loader.finish()


def _holds(model: Toy, weights: Weights) -> bool:
    live, expected = dict(model.named_parameters()), _expected(weights)
    return live.keys() == expected.keys() and all(torch.equal(live[n], expected[n]) for n in live)


@pytest.fixture
def model() -> Toy:
    return Toy()


@pytest.fixture
def learned(model: Toy) -> ModelLoader:
    loader = _loader(model)
    assert loader.needs is None
    _update(loader, _weights(0))
    assert _holds(model, _weights(0))
    return loader


def test_updates_are_replayed_and_what_computes_keeps_its_loader(model: Toy, learned: ModelLoader) -> None:
    assert learned.needs == {
        "gate": [((4, 8), (0, 3))],
        "up": [((4, 8), (0, 3))],
        "head.weight": [((0, 5), (0, 3))],
        "decay.weight": [((0, 4),)],
        "unused": [((0, 7),)],  # with a loader left, nobody knows whether it is
    }
    parameters = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    for seed in (1, 2):
        _update(learned, _weights(seed))
        assert _holds(model, _weights(seed))
    assert parameters == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_boxes_do_as_well_as_whole_tensors_in_any_order(model: Toy, learned: ModelLoader) -> None:
    weights, needs = _weights(3), learned.needs
    assert needs is not None
    learned.begin()
    for name in sorted(weights, reverse=True):
        for box in needs[name]:
            learned.load_boxes([(name, box, weights[name][tuple(slice(*ends) for ends in box)].clone())])
    learned.finish()
    assert _holds(model, weights)


@pytest.mark.parametrize("first", [True, False])
def test_an_update_that_broke_off_leaves_nothing_behind(model: Toy, first: bool) -> None:
    loader = _loader(model)
    if not first:
        _update(loader, _weights(0))
    loader.begin()
    loader.load([(name, _weights(1)[name]) for name in ("gate", "decay.weight")])
    _update(loader, _weights(2))
    assert _holds(model, _weights(2))


@pytest.mark.parametrize("name", ["up", "decay.weight", "head.weight"])
@pytest.mark.parametrize("first", [True, False])
def test_a_parameter_that_is_not_reached_is_named(model: Toy, name: str, first: bool) -> None:
    loader = _loader(model)
    if not first:
        _update(loader, _weights(0))
    weights = _weights(1)
    del weights[name]
    with pytest.raises(TransferError, match="1 parameters were not updated") as error:
        _update(loader, weights)
    assert ("merged.weight" if name == "up" else name) in str(error.value)
    _update(loader, _weights(2))
    assert _holds(model, _weights(2))


def test_tensors_that_do_not_fit_are_refused(learned: ModelLoader) -> None:
    learned.begin()
    with pytest.raises(TransferError, match="gate: got shape \\[4, 3\\]"):
        learned.load([("gate", torch.zeros(4, 3))])
    with pytest.raises(TransferError, match="new was not in the update"):
        learned.load([("new", torch.zeros(4, 3))])
    with pytest.raises(TransferError, match="decay.weight is needed whole"):
        learned.load_boxes([("decay.weight", ((0, 2),), torch.zeros(2))])


def test_a_partial_update_leaves_the_rest_as_it_is(model: Toy, learned: ModelLoader) -> None:
    """Rows of what takes copies; whole, together, what loaders take."""
    assert set(learned.together) == {("decay.weight", "unused")}
    weights, other = _weights(0), _weights(5)
    for name, rows in (("gate", (3, 6)), ("up", (0, 2)), ("head.weight", (4, 5))):
        weights[name][slice(*rows)] = other[name][slice(*rows)]
        learned.begin(partial=True)
        learned.load_boxes([(name, (rows, (0, 3)), other[name][slice(*rows)])])
        learned.finish()
        assert _holds(model, weights)
    for name in ("decay.weight", "unused"):
        weights[name] = other[name]
    learned.begin(partial=True)
    learned.load((name, other[name]) for name in ("decay.weight", "unused"))
    learned.finish()
    assert _holds(model, weights)
    learned.begin(partial=True)
    learned.finish()
    assert _holds(model, weights)
    _update(learned, _weights(6))
    assert _holds(model, _weights(6))


def test_a_partial_update_needs_a_whole_one_that_is_in_place(model: Toy, learned: ModelLoader) -> None:
    with pytest.raises(TransferError, match="needs a complete one before it"):
        _loader(model).begin(partial=True)
    learned.begin(partial=True)
    learned.load([("decay.weight", _weights(1)["decay.weight"])])
    with pytest.raises(TransferError, match="1 parameters were not updated: unused"):
        learned.finish()
    with pytest.raises(TransferError, match="needs a complete one before it"):
        learned.begin(partial=True)
    _update(learned, _weights(2))
    assert _holds(model, _weights(2))


def test_the_first_update_takes_whole_tensors(model: Toy) -> None:
    loader = _loader(model)
    loader.begin()
    with pytest.raises(TransferError, match="whole tensors"):
        loader.load_boxes([("gate", ((4, 8), (0, 3)), torch.zeros(4, 3))])


def test_a_parameter_that_got_other_memory_is_found(model: Toy, learned: ModelLoader) -> None:
    model.merged.weight.data = torch.zeros(8, 3)
    _update(learned, _weights(4))
    assert _holds(model, _weights(4))


#: Of two receivers: one needs the upper rows and one tensor whole, the other the lower rows.
SHARES = {
    0: {
        "gate": [((0, 4), (0, 3))],
        "up": [((0, 4), (0, 3))],
        "decay.weight": [((0, 4),)],
        "head.weight": [((0, 3), (0, 3))],
    },
    1: {
        "gate": [((4, 8), (0, 3))],
        "up": [((4, 8), (0, 3))],
        "decay.weight": [((2, 4),)],
        "head.weight": [((3, 5), (0, 3))],
    },
}


def _place(target: ModelTarget, plan: Plan, weights: Weights) -> None:
    """All buckets; each place is overwritten once it was placed, if it may be."""
    memory = torch.zeros(plan.arena_bytes, dtype=torch.uint8)
    target.begin(plan)
    for bucket in plan.buckets:
        for piece in blocks_of(bucket, memory):
            cut = weights[plan.tensors[piece.tensor].name][tuple(slice(*ends) for ends in piece.box)]
            piece.memory.copy_(cut.contiguous().view(-1).view(torch.uint8))
        for _, place in target.steps(plan, bucket, memory):
            place()
        if not plan.retains:
            memory.fill_(255)
    target.finish()


def _plan(*receivers: int, slots: int = 0) -> Plan:
    specs = [TensorSpec(name, "float32", tuple(tensor.shape)) for name, tensor in _weights(0).items()]
    needs = {receiver: SHARES[receiver] for receiver in receivers}
    return plan_push(Manifest.whole(specs), receivers, bucket_bytes=512, slots=slots, needs=needs)


@pytest.mark.parametrize("slots", [0, 2])
def test_a_model_learns_from_a_version_that_came_in_the_boxes_of_others(model: Toy, slots: int) -> None:
    loader, plan = _loader(model), _plan(0, 1, slots=slots)
    assert len(plan.buckets) > 2
    _place(_target(loader), plan, _weights(0))
    assert _holds(model, _weights(0))
    assert loader.needs is not None


def test_a_model_does_not_learn_from_boxes_that_are_not_all_of_it(model: Toy) -> None:
    loader = _loader(model)
    with pytest.raises(TransferError, match="2 parameters were not updated: head.weight, merged.weight"):
        _place(_target(loader), _plan(0), _weights(0))
    assert loader.needs is None
    _place(_target(loader), _plan(0, 1), _weights(1))
    assert _holds(model, _weights(1))

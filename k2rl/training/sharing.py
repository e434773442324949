"""Which rank computes which sequences of a batch: the same tokens for each, as far as they can be split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

from k2rl.training.batch import LabelledSequence

S = TypeVar("S", bound=LabelledSequence)

_FINENESS = (1, 2, 4, 8)
"""Groups may be split into parts of a fair share divided by one of these: the best of the deals is taken."""


def share(groups: Sequence[Sequence[S]], ranks: int) -> list[list[list[int]]]:
    """Deal a batch out to ranks, balanced by the positions that packing will compute.

    The members of a group share a prompt, which every rank that has one of them computes: groups are split
    only where that lowers the largest load. Depends on nothing but the arguments.

    Args:
        groups: as `pack` takes them.
        ranks: how many share them, at least 1.

    Returns:
        For each rank its groups, of indices into the flat list of sequences.
    """
    indices, first = [], 0
    for group in groups:
        indices.append(list(range(first, first + len(group))))
        first += len(group)
    flat = [sequence for group in groups for sequence in group]
    if ranks == 1:
        return [indices]

    def cost(members: list[int]) -> int:
        return estimated_positions([flat[index] for index in members])

    fair = sum(map(cost, indices)) / ranks
    deals = []
    for divisor in _FINENESS:
        units = [part for group in indices for part in _split(group, cost(group), fair / divisor)]
        deals.append(_deal(sorted(units, key=lambda unit: (-cost(unit), unit)), ranks, cost))
    return min(deals, key=lambda deal: deal[0])[1]


def _deal(
    units: Sequence[list[int]], ranks: int, cost: Callable[[list[int]], int]
) -> tuple[int, list[list[list[int]]]]:
    """Each unit to whom has least so far; the largest load, and the ranks' units in the batch's order."""
    loads = [0] * ranks
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    for unit in units:
        rank = loads.index(min(loads))
        loads[rank] += cost(unit)
        dealt[rank].append(unit)
    return max(loads), [sorted(units) for units in dealt]


def estimated_positions(group: Sequence[LabelledSequence]) -> int:
    """Positions of a packed group, were what all of its members have in common all that is shared."""
    if not group:
        return 0
    texts = [sequence.token_ids for sequence in group]
    # What the first and the last in order have in common, all have.
    pairs = enumerate(zip(min(texts), max(texts), strict=False))
    shared = next((index for index, (one, other) in pairs if one != other), len(min(texts)))
    return shared + sum(len(text) - shared for text in texts)


def _split(group: list[int], cost: int, limit: float) -> list[list[int]]:
    """A group in as many parts as its positions have room for the limit, and one member has at most."""
    parts = min(len(group), math.ceil(cost / limit)) if cost > limit else 1
    bounds = [len(group) * number // parts for number in range(parts + 1)]
    return [group[start:stop] for start, stop in pairwise(bounds) if stop > start]

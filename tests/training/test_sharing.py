"""How a batch is dealt out to ranks."""

from __future__ import annotations

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from k2rl.training.batch import SupervisedSequence
from k2rl.training.sharing import estimated_positions, share


def text(*tokens: int) -> SupervisedSequence:
    return SupervisedSequence(tokens, (False,) + (True,) * (len(tokens) - 1))


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12)
batches = st.lists(st.lists(tokens.map(lambda ids: text(*ids)), max_size=6), max_size=8)


@given(batches, st.integers(1, 5))
def test_every_sequence_goes_to_one_rank_with_others_of_its_group(
    groups: list[list[SupervisedSequence]], ranks: int
) -> None:
    dealt = share(groups, ranks)
    assert len(dealt) == ranks
    count = sum(map(len, groups))
    assert sorted(chain.from_iterable(chain.from_iterable(dealt))) == list(range(count))
    group_of = [number for number, group in enumerate(groups) for _ in group]
    for unit in chain.from_iterable(dealt):
        assert len({group_of[index] for index in unit}) <= 1
        assert unit == sorted(unit)
    assert dealt == share(groups, ranks)


def test_loads_are_even() -> None:
    def group(prompt: int, members: int) -> list[SupervisedSequence]:
        return [text(*range(prompt), 100 + member, 7, 7, 7) for member in range(members)]

    for groups, ranks in (([group(10, 8)] * 3, 2), ([group(10, 64)], 4), ([group(1, 8)] * 7, 3)):
        flat = list(chain.from_iterable(groups))
        loads = [
            sum(estimated_positions([flat[index] for index in unit]) for unit in units)
            for units in share(groups, ranks)
        ]
        assert max(loads) <= 1.1 * sum(loads) / ranks
    assert share([group(3, 2)] * 4, 2) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]], "groups stay whole"


def test_one_rank_takes_everything_and_many_leave_some_idle() -> None:
    groups = [[text(1, 2)], [text(1, 2, 3), text(1, 2, 4)]]
    assert share(groups, 1) == [[[0], [1, 2]]]
    assert sorted(map(len, share(groups, 5))) == [0, 0, 1, 1, 1]

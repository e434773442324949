"""Packed rows say the same as the sequences they were made of."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2rl.training.batch import SupervisedSequence
from k2rl.training.packing import MicroBatch, pack

# Two or three token values, so that prefixes are often shared and sequences often equal.
tokens = st.lists(st.integers(5, 7), min_size=1, max_size=12)


@st.composite
def sequences(draw: st.DrawFn) -> SupervisedSequence:
    ids = draw(tokens)
    mask = [False] + [draw(st.booleans()) for _ in ids[1:]]
    return SupervisedSequence(tuple(ids), tuple(mask))


groups = st.lists(st.lists(sequences(), max_size=5), max_size=5)


def ancestors(batch: MicroBatch, position: int) -> list[int]:
    """Positions that a position sees, in order."""
    (block,) = [block for block in batch.tree.blocks if block.start <= position < block.stop]
    keys = [key for first, last in block.key_runs for key in range(first, last)]
    return [
        key for key, bias in zip(keys, block.mask[position - block.start].tolist(), strict=True) if bias == 0
    ]


def flat(nested: Sequence[Sequence[SupervisedSequence]]) -> list[SupervisedSequence]:
    return [sequence for group in nested for sequence in group]


@given(groups, st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_every_label_is_predicted_from_exactly_its_prefix(
    batch_groups: list[list[SupervisedSequence]], micro_batch_tokens: int
) -> None:
    """The whole contract at once: nothing lost, order restored, positions and mask right."""
    originals = flat(batch_groups)
    seen: list[int] = []
    for batch in pack(batch_groups, micro_batch_tokens):
        labels_of: list[list[tuple[int, int]]] = [[] for _ in batch.sequences]
        for predictor, target, sequence in zip(
            batch.predictors[batch.label_predictor].tolist(),
            batch.targets.tolist(),
            batch.sequence_index.tolist(),
            strict=True,
        ):
            labels_of[sequence].append((predictor, target))
        for index, labels in zip(batch.sequences, labels_of, strict=True):
            original = originals[index]
            wanted = [position for position, label in enumerate(original.loss_mask) if label]
            assert [target for _, target in labels] == [original.token_ids[p] for p in wanted]
            for (predictor, _), position in zip(labels, wanted, strict=True):
                visible = ancestors(batch, predictor)
                assert batch.input_ids[0, visible].tolist() == list(original.token_ids[:position])
                assert batch.position_ids[0, visible].tolist() == list(range(position))
        seen.extend(batch.sequences)
    assert sorted(seen) == list(range(len(originals)))


@given(groups, st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_a_micro_batch_holds_each_prefix_once_and_keeps_its_limit(
    batch_groups: list[list[SupervisedSequence]], micro_batch_tokens: int
) -> None:
    originals = flat(batch_groups)
    longest = max((len(sequence.token_ids) for sequence in originals), default=0)
    for batch in pack(batch_groups, micro_batch_tokens):
        assert batch.num_positions <= max(micro_batch_tokens, longest)
        prefixes = [
            tuple(batch.input_ids[0, ancestors(batch, position)].tolist())
            for position in range(batch.num_positions)
        ]
        assert len(set(prefixes)) == len(prefixes)


@given(groups)
@settings(max_examples=50, deadline=None)
def test_packing_is_deterministic(batch_groups: list[list[SupervisedSequence]]) -> None:
    first, second = (pack(batch_groups, 40) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.sequences == other.sequences
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.predictors, other.predictors)


def group_of(prompt: list[int], responses: list[list[int]]) -> list[SupervisedSequence]:
    return [
        SupervisedSequence(tuple(prompt + response), (False,) * len(prompt) + (True,) * len(response))
        for response in responses
    ]


def test_a_group_reads_its_prompt_once() -> None:
    """Three responses to (1, 2, 3); the last token of each is only a target, never an input."""
    (batch,) = pack([group_of([1, 2, 3], [[4, 5], [6, 7, 8], [4, 9]])], 64)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 6, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3, 4]]
    assert ancestors(batch, 4) == [0, 1, 2, 4]
    # The prompt's last token predicts 4, 6 and 4; the shared 4 predicts 5 and 9.
    assert batch.predictors[batch.label_predictor].tolist() == [2, 3, 2, 4, 5, 2, 3]
    assert batch.targets.tolist() == [4, 5, 6, 7, 8, 4, 9]


def test_a_group_too_large_is_split_and_repeats_its_prompt() -> None:
    group = group_of([1, 2, 3], [[token, token, token] for token in range(10, 16)])
    batches = pack([group], micro_batch_tokens=8)
    assert [batch.sequences for batch in batches] == [(0, 1), (2, 3), (4, 5)]
    assert all(batch.input_ids[0, :3].tolist() == [1, 2, 3] for batch in batches)


def test_groups_share_what_their_prompts_share() -> None:
    """A system message (1, 2) above eight prompts of one token, two responses each."""
    many = [group_of([1, 2, index], [[3, 3], [4, 4]]) for index in range(20, 28)]
    (batch,) = pack(many, micro_batch_tokens=26)
    assert batch.num_positions == 2 + 8 * 3
    assert batch.sequences == tuple(range(16))


def test_groups_that_do_not_fit_go_to_the_next_micro_batch() -> None:
    many = [group_of([index], [[3, 3], [4, 4]]) for index in range(20, 23)]  # 3 positions each
    assert [batch.sequences for batch in pack(many, micro_batch_tokens=7)] == [(0, 1, 2, 3), (4, 5)]


def test_a_sequence_without_labels_costs_nothing_but_is_listed() -> None:
    (batch,) = pack([[SupervisedSequence((1, 2, 3), (False, False, False))]], 8)
    assert batch.sequences == (0,)
    assert batch.predictors.numel() == batch.targets.numel() == 0


def test_nothing_packs_to_nothing_and_bad_limits_are_refused() -> None:
    assert pack([], 8) == []
    assert pack([[]], 8) == []
    with pytest.raises(ValueError, match="positive"):
        pack([], 0)

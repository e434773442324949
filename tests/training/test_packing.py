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


def ancestors(batch: MicroBatch, row: int, column: int) -> list[int]:
    """Columns that a position sees, in order."""
    return batch.attention_mask()[row, 0, column].nonzero()[:, 0].tolist()


def flat(nested: Sequence[Sequence[SupervisedSequence]]) -> list[SupervisedSequence]:
    return [sequence for group in nested for sequence in group]


@given(groups, st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_every_label_is_predicted_from_exactly_its_prefix(
    batch_groups: list[list[SupervisedSequence]], micro_batch_tokens: int, row_tokens: int
) -> None:
    """The whole contract at once: nothing lost, order restored, positions and mask right."""
    originals = flat(batch_groups)
    seen: list[int] = []
    for batch in pack(batch_groups, micro_batch_tokens, row_tokens):
        length = batch.input_ids.shape[1]
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
                visible = ancestors(batch, predictor // length, predictor % length)
                row = predictor // length
                assert batch.input_ids[row, visible].tolist() == list(original.token_ids[:position])
                assert batch.position_ids[row, visible].tolist() == list(range(position))
        seen.extend(batch.sequences)
    assert sorted(seen) == list(range(len(originals)))


@given(groups, st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_limits_hold_unless_one_sequence_is_too_long(
    batch_groups: list[list[SupervisedSequence]], micro_batch_tokens: int, row_tokens: int
) -> None:
    longest = max((len(sequence.token_ids) for sequence in flat(batch_groups)), default=0)
    for batch in pack(batch_groups, micro_batch_tokens, row_tokens):
        assert batch.input_ids.numel() <= max(micro_batch_tokens, longest)
        assert batch.num_tokens <= batch.input_ids.numel()
        assert batch.predictors.tolist() == sorted(set(batch.predictors.tolist()))


@given(groups)
@settings(max_examples=50, deadline=None)
def test_packing_is_deterministic(batch_groups: list[list[SupervisedSequence]]) -> None:
    first, second = (pack(batch_groups, 40, 20) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.sequences == other.sequences
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.subtree_end, other.subtree_end)


def group_of(prompt: list[int], responses: list[list[int]]) -> list[SupervisedSequence]:
    return [
        SupervisedSequence(tuple(prompt + response), (False,) * len(prompt) + (True,) * len(response))
        for response in responses
    ]


def test_a_group_reads_its_prompt_once() -> None:
    """Three responses to (1, 2, 3); the last token of each is only a target, never an input."""
    (batch,) = pack([group_of([1, 2, 3], [[4, 5], [6, 7, 8], [4, 9]])], 64, 64)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 6, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3, 4]]
    assert ancestors(batch, 0, 4) == [0, 1, 2, 4]
    # The prompt's last token predicts 4, 6 and 4; the shared 4 predicts 5 and 9.
    assert batch.predictors[batch.label_predictor].tolist() == [2, 3, 2, 4, 5, 2, 3]
    assert batch.targets.tolist() == [4, 5, 6, 7, 8, 4, 9]
    assert batch.num_tokens == 6


def test_a_group_too_large_is_split_and_repeats_its_prompt() -> None:
    group = group_of([1, 2, 3], [[token, token, token] for token in range(10, 16)])
    batches = pack([group], micro_batch_tokens=8, row_tokens=8)
    assert [batch.sequences for batch in batches] == [(0, 1), (2, 3), (4, 5)]
    assert all(batch.input_ids[0, :3].tolist() == [1, 2, 3] for batch in batches)


def test_small_groups_share_a_row_and_rows_share_a_micro_batch() -> None:
    many = [group_of([index], [[1, 1], [2, 2]]) for index in range(20, 28)]  # 3 tokens each
    (batch,) = pack(many, micro_batch_tokens=24, row_tokens=6)
    assert batch.input_ids.shape == (4, 6)
    assert sorted(batch.sequences) == list(range(16))


def test_a_sequence_without_labels_costs_nothing_but_is_listed() -> None:
    (batch,) = pack([[SupervisedSequence((1, 2, 3), (False, False, False))]], 8, 8)
    assert batch.sequences == (0,)
    assert batch.num_tokens == 0
    assert batch.predictors.numel() == batch.targets.numel() == 0


def test_nothing_packs_to_nothing_and_bad_limits_are_refused() -> None:
    assert pack([], 8, 8) == []
    assert pack([[]], 8, 8) == []
    with pytest.raises(ValueError, match="positive"):
        pack([], 0, 8)

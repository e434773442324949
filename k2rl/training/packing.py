"""Shared-prefix packing: every distinct prefix of a batch is computed once.

The K responses of a group share their prompt, and often the beginning of the answer too. The sequences
of a row are merged into a prefix tree and laid out depth-first: a token's position id is its depth, and
it attends to its ancestors. In depth-first order a subtree is a contiguous range, so the whole tree mask
is two comparisons: query i sees key j iff `j <= i < subtree_end[j]`.

A hidden state depends on its ancestors alone, so log-probs and gradients equal those of the sequences
computed one by one, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from k2rl.training.batch import LabelledSequence


@dataclass(frozen=True)
class MicroBatch:
    """B rows of L positions, with N labels of S sequences predicted from U distinct positions."""

    #: [B, L] int64; padding repeats token 0 and is seen by no other position.
    input_ids: Tensor
    #: [B, L] int64, depth in the prefix tree.
    position_ids: Tensor
    #: [B, L] int64, one past the last position of the token's subtree, in its row.
    subtree_end: Tensor
    #: [U] int64, ascending: positions (`row * L + column`) whose hidden state predicts something.
    predictors: Tensor
    #: [N] int64 in [0, U): the predictor of each label.
    label_predictor: Tensor
    #: [N] int64: the token to be predicted. Labels are ordered by sequence, then by token.
    targets: Tensor
    #: [N] int64 in [0, S): the label's sequence, an index into `sequences`.
    sequence_index: Tensor
    #: S indices into the flat list of sequences that was packed.
    sequences: tuple[int, ...]
    #: Positions that are not padding.
    num_tokens: int

    def attention_mask(self) -> Tensor:
        """[B, 1, L, L] bool, True where the query (third axis) sees the key (fourth)."""
        position = torch.arange(self.input_ids.shape[1])
        query, key_end = position[None, :, None], self.subtree_end[:, None, :]
        return ((position[None, None, :] <= query) & (query < key_end))[:, None]


def pack(
    groups: Sequence[Sequence[LabelledSequence]], micro_batch_tokens: int, row_tokens: int
) -> list[MicroBatch]:
    """Pack sequences into micro-batches; groups stay together where they fit.

    Args:
        groups: sequences that are likely to share a prefix. One-sequence groups are fine.
        micro_batch_tokens: limit of B * L for each micro-batch. A single sequence that is longer gets a
            micro-batch of its own.
        row_tokens: rows are filled up to this length. Attention costs the square of it, short rows
            share less and pad more. A group larger than this, but within the micro-batch, is one row.

    Returns:
        Micro-batches in which every sequence occurs once. Sequences are numbered in the order given;
        `MicroBatch.sequences` restores it. One without labels adds no tokens but is listed.

    Raises:
        ValueError: if a limit is not positive.
    """
    if micro_batch_tokens < 1 or row_tokens < 1:
        raise ValueError(f"micro_batch_tokens={micro_batch_tokens}, row_tokens={row_tokens} must be positive")
    rows = _fill_rows(groups, micro_batch_tokens, min(row_tokens, micro_batch_tokens))
    # Rows of similar length go together, so that padding stays small; the sort is stable: deterministic.
    rows.sort(key=lambda row: -row.num_tokens)
    batches: list[list[_PrefixTree]] = []
    for row in rows:
        if batches and (len(batches[-1]) + 1) * max(1, batches[-1][0].num_tokens) <= micro_batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return [_to_micro_batch(rows) for rows in batches]


@dataclass
class _Branch:
    """A sequence in a tree: the nodes of its input tokens, and its labels."""

    sequence: int
    nodes: list[int]
    #: Indices of the tokens to be predicted; token t is predicted from node t - 1.
    label_positions: list[int]
    targets: list[int]


@dataclass
class _PrefixTree:
    """One row: sequences merged by their common prefixes. Node 0 is the root before all tokens."""

    tokens: list[int] = field(default_factory=lambda: [-1])
    depth: list[int] = field(default_factory=lambda: [-1])
    children: list[dict[int, int]] = field(default_factory=lambda: [{}])
    branches: list[_Branch] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) - 1

    def new_tokens(self, item: _Item) -> int:
        """Nodes that inserting it would add."""
        node = 0
        for index, token in enumerate(item.inputs):
            child = self.children[node].get(token)
            if child is None:
                return len(item.inputs) - index
            node = child
        return 0

    def insert(self, item: _Item) -> None:
        node, nodes = 0, []
        for token in item.inputs:
            child = self.children[node].get(token)
            if child is None:
                child = len(self.tokens)
                self.children[node][token] = child
                self.tokens.append(token)
                self.depth.append(self.depth[node] + 1)
                self.children.append({})
            node = child
            nodes.append(node)
        self.branches.append(_Branch(item.sequence, nodes, item.label_positions, item.targets))

    def layout(self) -> tuple[list[int], list[int]]:
        """Depth-first order.

        Returns:
            The nodes in row order (without the root), and for each of them where its subtree ends.
        """
        order: list[int] = []
        end = [0] * len(self.tokens)
        stack = [(0, False)]
        while stack:
            node, done = stack.pop()
            if done:
                end[node] = len(order)
                continue
            if node:
                order.append(node)
            stack.append((node, True))
            stack.extend((child, False) for child in reversed(self.children[node].values()))
        return order, [end[node] for node in order]


@dataclass(frozen=True)
class _Item:
    """A sequence cut to what the model must read: tokens after the last label's predictor are useless."""

    sequence: int
    inputs: tuple[int, ...]
    label_positions: list[int]
    targets: list[int]


def _items(groups: Sequence[Sequence[LabelledSequence]]) -> Iterator[list[_Item]]:
    sequence = 0
    for group in groups:
        items = []
        for member in group:
            labels = [index for index, label in enumerate(member.label_mask) if label]
            inputs = member.token_ids[: labels[-1]] if labels else ()
            items.append(_Item(sequence, inputs, labels, [member.token_ids[index] for index in labels]))
            sequence += 1
        if items:
            yield items


def _fill_rows(
    groups: Sequence[Sequence[LabelledSequence]], micro_batch_tokens: int, row_tokens: int
) -> list[_PrefixTree]:
    """First fit, whole groups: into the first row with room, else one of its own, else split."""
    rows: list[_PrefixTree] = []
    for items in _items(groups):
        group = _PrefixTree()
        for item in items:
            group.insert(item)
        home = next((row for row in rows if row.num_tokens + group.num_tokens <= row_tokens), None)
        if home is not None:
            for item in items:
                home.insert(item)
        elif group.num_tokens <= micro_batch_tokens:
            rows.append(group)
        else:
            rows.extend(_split_group(items, micro_batch_tokens))
    return rows


def _split_group(items: Sequence[_Item], limit: int) -> list[_PrefixTree]:
    """A group too large for a micro-batch: several rows, each with the shared prompt again."""
    rows = [_PrefixTree()]
    for item in items:
        added = rows[-1].new_tokens(item)
        if rows[-1].num_tokens and added and rows[-1].num_tokens + added > limit:
            rows.append(_PrefixTree())
        rows[-1].insert(item)
    return rows


def _to_micro_batch(rows: Sequence[_PrefixTree]) -> MicroBatch:
    length = max(1, *(row.num_tokens for row in rows)) if rows else 1
    shape = (len(rows), length)
    input_ids = torch.zeros(shape, dtype=torch.int64)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    subtree_end = torch.arange(1, length + 1).repeat(len(rows), 1)  # padding sees itself: no empty softmax
    predictors: list[int] = []
    targets: list[int] = []
    sequence_index: list[int] = []
    sequences: list[int] = []
    for index, row in enumerate(rows):
        order, ends = row.layout()
        count = len(order)
        input_ids[index, :count] = torch.tensor([row.tokens[node] for node in order], dtype=torch.int64)
        position_ids[index, :count] = torch.tensor([row.depth[node] for node in order], dtype=torch.int64)
        subtree_end[index, :count] = torch.tensor(ends, dtype=torch.int64)
        column = {node: place for place, node in enumerate(order)}
        for branch in row.branches:
            for position, target in zip(branch.label_positions, branch.targets, strict=True):
                predictors.append(index * length + column[branch.nodes[position - 1]])
                targets.append(target)
                sequence_index.append(len(sequences))
            sequences.append(branch.sequence)
    unique, inverse = torch.unique(torch.tensor(predictors, dtype=torch.int64), return_inverse=True)
    return MicroBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        subtree_end=subtree_end,
        predictors=unique,
        label_predictor=inverse,
        targets=torch.tensor(targets, dtype=torch.int64),
        sequence_index=torch.tensor(sequence_index, dtype=torch.int64),
        sequences=tuple(sequences),
        num_tokens=sum(row.num_tokens for row in rows),
    )

"""Shared-prefix packing: every distinct prefix of a micro-batch is computed once.

The K responses of a group share their prompt, and often the beginning of the answer too; prompts share a
system message. The sequences of a micro-batch are merged into one prefix tree and laid out depth-first as
one row: a token's position id is its depth, and it attends to its ancestors. In depth-first order a
subtree is a contiguous range, so query i sees key j iff `j <= i < subtree_end[j]`.

A hidden state depends on its ancestors alone, so log-probs and gradients equal those of the sequences
computed one by one, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from k2rl.training.batch import LabelledSequence
from k2rl.training.tree_attention import Tree


@dataclass(frozen=True)
class MicroBatch:
    """A row of T positions, with N labels of S sequences predicted from U distinct positions."""

    #: [1, T] int64.
    input_ids: Tensor
    #: [1, T] int64, depth in the prefix tree.
    position_ids: Tensor
    #: What each position sees, for `tree_attention`.
    tree: Tree
    #: [U] int64, ascending: positions whose hidden state predicts something.
    predictors: Tensor
    #: [N] int64 in [0, U): the predictor of each label.
    label_predictor: Tensor
    #: [N] int64: the token to be predicted. Labels are ordered by sequence, then by token.
    targets: Tensor
    #: [N] int64 in [0, S): the label's sequence, an index into `sequences`.
    sequence_index: Tensor
    #: S indices into the flat list of sequences that was packed.
    sequences: tuple[int, ...]
    #: [T, layers * experts a token] int64, the experts that are to compute each position; -1 in a whole row:
    #: those that the routers choose. None: they choose all.
    routes: Tensor | None = None

    @property
    def num_positions(self) -> int:
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            tree=self.tree.to(device),
            predictors=self.predictors.to(device),
            label_predictor=self.label_predictor.to(device),
            targets=self.targets.to(device),
            sequence_index=self.sequence_index.to(device),
            sequences=self.sequences,
            routes=None if self.routes is None else self.routes.to(device),
        )


def pack(groups: Sequence[Sequence[LabelledSequence]], micro_batch_tokens: int) -> list[MicroBatch]:
    """Pack sequences into micro-batches; groups stay together where they fit.

    Args:
        groups: sequences that are likely to share a prefix. One-sequence groups are fine.
        micro_batch_tokens: positions in a micro-batch, at most. A longer sequence gets one of its own.

    Returns:
        Micro-batches in which every sequence occurs once. Sequences are numbered in the order given and
        `MicroBatch.sequences` restores it. One without labels is listed but adds no position.

    Raises:
        ValueError: if the limit is not positive.
    """
    if micro_batch_tokens < 1:
        raise ValueError(f"micro_batch_tokens={micro_batch_tokens} must be positive")
    trees: list[_PrefixTree] = []
    for items in _items(groups):
        alone = _PrefixTree.of(items)
        # First fit: the first micro-batch with room for the whole group; else split it over new ones.
        room = (tree for tree in trees if tree.num_tokens + tree.added_by(alone) <= micro_batch_tokens)
        if (home := next(room, None)) is not None:
            home.insert(items)
        else:
            trees.extend(_plant(items, micro_batch_tokens))
    return [tree.to_micro_batch() for tree in trees]


def empty_micro_batch() -> MicroBatch:
    """One position that predicts nothing: for a rank that has no more sequences while others have."""
    return _PrefixTree().to_micro_batch()


@dataclass(frozen=True)
class _Item:
    """A sequence cut to what the model must read: from the last label on, tokens predict nothing."""

    sequence: int
    inputs: tuple[int, ...]
    #: Indices of the tokens to be predicted; token t is predicted from token t - 1.
    label_positions: list[int]
    targets: list[int]
    #: Of its first inputs.
    routes: tuple[bytes, ...]


def _items(groups: Sequence[Sequence[LabelledSequence]]) -> Iterator[list[_Item]]:
    sequence = 0
    for group in groups:
        items = []
        for member in group:
            labels = [index for index, label in enumerate(member.label_mask) if label]
            inputs = member.token_ids[: labels[-1]] if labels else ()
            targets = [member.token_ids[index] for index in labels]
            items.append(_Item(sequence, inputs, labels, targets, member.routes[: len(inputs)]))
            sequence += 1
        if items:
            yield items


def _plant(items: Sequence[_Item], limit: int) -> list[_PrefixTree]:
    """New micro-batches for a group: one if it fits, else several that repeat the shared prompt."""
    trees = [_PrefixTree()]
    for item in items:
        added = trees[-1].added_by(_PrefixTree.of([item]))
        if trees[-1].num_tokens and added and trees[-1].num_tokens + added > limit:
            trees.append(_PrefixTree())
        trees[-1].insert([item])
    return trees


@dataclass
class _PrefixTree:
    """Sequences merged by their common prefixes. Node 0 is the root before all tokens."""

    tokens: list[int] = field(default_factory=lambda: [-1])
    depth: list[int] = field(default_factory=lambda: [-1])
    children: list[dict[int, int]] = field(default_factory=lambda: [{}])
    #: Of the first sequence that came by; the root and what is not known have none.
    routes: list[bytes] = field(default_factory=lambda: [b""])
    #: Each inserted sequence with the nodes of its input tokens.
    branches: list[tuple[_Item, list[int]]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) - 1

    @classmethod
    def of(cls, items: Sequence[_Item]) -> _PrefixTree:
        tree = cls()
        tree.insert(items)
        return tree

    def added_by(self, other: _PrefixTree) -> int:
        """Nodes that inserting the other tree's sequences would add."""
        shared, stack = 0, [(0, 0)]
        while stack:
            mine, theirs = stack.pop()
            for token, child in other.children[theirs].items():
                if token in self.children[mine]:
                    shared += 1
                    stack.append((self.children[mine][token], child))
        return other.num_tokens - shared

    def insert(self, items: Sequence[_Item]) -> None:
        for item in items:
            node, nodes = 0, []
            for index, token in enumerate(item.inputs):
                child = self.children[node].get(token)
                if child is None:
                    child = len(self.tokens)
                    self.children[node][token] = child
                    self.tokens.append(token)
                    self.depth.append(self.depth[node] + 1)
                    self.children.append({})
                    self.routes.append(item.routes[index] if index < len(item.routes) else b"")
                node = child
                nodes.append(node)
            self.branches.append((item, nodes))

    def depth_first(self) -> tuple[list[int], list[int]]:
        """The nodes in row order (without the root), and one past each one's subtree in that order."""
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

    def to_micro_batch(self) -> MicroBatch:
        order, ends = self.depth_first()
        column = {node: place for place, node in enumerate(order)}
        predictors, targets, sequence_index = [], [], []
        for index, (item, nodes) in enumerate(self.branches):
            predictors += [column[nodes[position - 1]] for position in item.label_positions]
            targets += item.targets
            sequence_index += [index] * len(item.targets)
        unique, inverse = torch.unique(torch.tensor(predictors, dtype=torch.int64), return_inverse=True)
        # A micro-batch without any label still needs a position: a model cannot read nothing.
        return MicroBatch(
            input_ids=torch.tensor([[self.tokens[node] for node in order] or [0]]),
            position_ids=torch.tensor([[self.depth[node] for node in order] or [0]]),
            tree=Tree(torch.tensor(ends or [1])),
            predictors=unique,
            label_predictor=inverse,
            targets=torch.tensor(targets, dtype=torch.int64),
            sequence_index=torch.tensor(sequence_index, dtype=torch.int64),
            sequences=tuple(item.sequence for item, _ in self.branches),
            routes=_stacked([self.routes[node] for node in order]),
        )


def _stacked(routes: Sequence[bytes]) -> Tensor | None:
    size = len(next(filter(None, routes), b"")) // 2
    if not size:
        return None
    known = torch.tensor([bool(route) for route in routes])
    rows = torch.full((len(routes), size), -1, dtype=torch.int64)
    raw = bytearray(b"".join(routes))
    rows[known] = torch.frombuffer(raw, dtype=torch.uint16).view(-1, size).to(torch.int64)
    return rows

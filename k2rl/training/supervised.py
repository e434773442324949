"""Texts to imitate, as ids: PTX chats and demonstrations, tokenised exactly as rollouts are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import groupby

from k2rl.models.chat import ChatTemplate
from k2rl.training.batch import SupervisedSequence
from k2rl.types import Message, Trajectory


def chat_sequence(messages: Sequence[Message], chat: ChatTemplate, id: str = "") -> SupervisedSequence:
    """A chat with the loss on the assistant's tokens, its stop tokens included.

    Raises:
        ValueError: if the chat does not alternate between others and the assistant, beginning with others.
    """
    runs = [(role, list(run)) for role, run in groupby(messages, key=lambda m: m.role == "assistant")]
    if not runs or runs[0][0] or any(policy and len(run) > 1 for policy, run in runs):
        raise ValueError(f"chat {id!r} must begin with a system or user message, assistant turns stand alone")
    token_ids: list[int] = []
    loss_mask: list[bool] = []
    for policy, run in runs:
        if policy:
            part = chat.turn_ids(run[0])
        else:
            part = chat.continuation_ids(run, turn_closed=True) if token_ids else chat.prompt_ids(run)
        token_ids += part
        loss_mask += [policy] * len(part)
    return SupervisedSequence(tuple(token_ids), tuple(loss_mask), id)


def demonstration_sequence(trajectory: Trajectory) -> SupervisedSequence:
    """A played demonstration with the loss on the policy's tokens."""
    return SupervisedSequence(tuple(trajectory.token_ids), tuple(trajectory.sampled_mask), trajectory.id)


class PTXCorpus:
    """Curated sequences, reshuffled each pass; which ones a step gets depends on seed and step alone."""

    def __init__(self, sequences: Sequence[SupervisedSequence], per_step: int, seed: int) -> None:
        self._sequences = list(sequences)
        self._per_step = per_step
        self._seed = seed

    def sample(self, step: int) -> list[SupervisedSequence]:
        """The sequences of a step (from 1); empty if there is no corpus."""
        if not self._sequences:
            return []
        first = (step - 1) * self._per_step
        return [self._at(index) for index in range(first, first + self._per_step)]

    def _at(self, index: int) -> SupervisedSequence:
        epoch, offset = divmod(index, len(self._sequences))
        order = list(range(len(self._sequences)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return self._sequences[order[offset]]

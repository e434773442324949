"""Texts to imitate, as ids: chats and demonstrations, tokenised exactly as rollouts are."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Sequence
from itertools import groupby

from k2rl.errors import ConfigError
from k2rl.models.chat import ChatTemplate
from k2rl.training.batch import SupervisedSequence
from k2rl.training.chats import load_chats
from k2rl.types import Message, ToolSpec, Trajectory


def load_sequences(path: str, key: str, chat: ChatTemplate, limit: int) -> list[SupervisedSequence]:
    """The chats of a file, ready to be trained on.

    Args:
        path: see `load_chats`.
        key: of the configuration, that names the file.
        chat: of the model.
        limit: tokens that one may have: `train.micro_batch_tokens`.

    Raises:
        ConfigError: one line that says which chat is wrong.
    """
    sequences = []
    for number, talk in enumerate(load_chats(path, key), start=1):
        name = f"{path}, chat {number}"
        try:
            sequence = chat_sequence(talk.messages, chat, name, talk.tools)
        except (ConfigError, ValueError) as error:
            raise ConfigError(f"{name}: {error}") from error
        if len(sequence.token_ids) > limit:
            raise ConfigError(
                f"{name}: {len(sequence.token_ids)} tokens are more than train.micro_batch_tokens={limit}; "
                "shorten the chat or raise the limit"
            )
        sequences.append(sequence)
    return sequences


def chat_sequence(
    messages: Sequence[Message], chat: ChatTemplate, id: str = "", tools: Sequence[ToolSpec] = ()
) -> SupervisedSequence:
    """A chat with the loss on the assistant's tokens, its stop tokens included; `tools` are in its prompt.

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
            part = chat.continuation_ids(run, turn_closed=True) if token_ids else chat.prompt_ids(run, tools)
        token_ids += part
        loss_mask += [policy] * len(part)
    return SupervisedSequence(tuple(token_ids), tuple(loss_mask), id)


def demonstration_sequence(trajectory: Trajectory) -> SupervisedSequence:
    """A played demonstration with the loss on the policy's tokens."""
    return SupervisedSequence(tuple(trajectory.token_ids), tuple(trajectory.sampled_mask), trajectory.id)


def held_out_of(
    sequences: Sequence[SupervisedSequence], wanted: int | float
) -> tuple[list[SupervisedSequence], list[SupervisedSequence]]:
    """Texts to train on, and those held out.

    Which ones depends on what they say alone; equal texts are on the same side.

    Args:
        sequences: all of them.
        wanted: how many of the different ones to hold out, as an int from 1; or about which share of them,
            as a float below 1: at least one then, and never all.

    Raises:
        ValueError: none would be left to train on.
    """
    by_digest = {sequence: _digest(sequence) for sequence in sequences}
    digests = sorted(set(by_digest.values()))
    if len(digests) < 2:
        raise ValueError("all chats are the same, so that none can be held out")
    if isinstance(wanted, float):
        wanted = min(len(digests) - 1, max(1, round(wanted * len(digests))))
    if wanted >= len(digests):
        raise ValueError(f"there are {len(digests)} different chats, and one must be left to learn from")
    held = set(digests[:wanted])
    train = [sequence for sequence in sequences if by_digest[sequence] not in held]
    return train, [sequence for sequence in sequences if by_digest[sequence] in held]


def _digest(sequence: SupervisedSequence) -> bytes:
    return hashlib.sha256(repr(sequence.token_ids).encode()).digest()


class Corpus:
    """Texts, reshuffled each pass; which ones a step gets depends on seed and step alone."""

    def __init__(self, sequences: Sequence[SupervisedSequence], per_step: int, seed: int) -> None:
        self._sequences = list(sequences)
        self._per_step = per_step
        self._seed = seed
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def sample(self, step: int) -> list[SupervisedSequence]:
        """The sequences of a step (from 1); empty if there is no corpus."""
        if not self._sequences:
            return []
        first = (step - 1) * self._per_step
        return [self._at(index) for index in range(first, first + self._per_step)]

    def _at(self, index: int) -> SupervisedSequence:
        epoch, offset = divmod(index, len(self._sequences))
        return self._sequences[self._order(epoch)[offset]]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self._sequences)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order

"""The curated texts of a run of RL: what it imitates beside its rewards, and what it never sees."""

from __future__ import annotations

from collections.abc import Sequence

from k2rl.config import Config
from k2rl.errors import ConfigError
from k2rl.models.chat import ChatTemplate
from k2rl.training.batch import SupervisedSequence
from k2rl.training.decontamination import find_overlap
from k2rl.training.supervised import held_out_of, load_sequences
from k2rl.types import Task


def curated(
    config: Config, chat: ChatTemplate, eval_tasks: Sequence[Task]
) -> tuple[list[SupervisedSequence], list[SupervisedSequence]]:
    """The chats of `ptx.path`: those to learn from, and those held out; none if nobody asks for any.

    Which ones are held out depends on what they say alone: a resumed run has the same, whatever its seed.

    Raises:
        ConfigError: a chat is wrong, too long or holds a part of a task of `eval_tasks`, or too few are left.
    """
    ptx = config.ptx
    if not (ptx.weight or ptx.held_out or config.warm_start.texts):
        return [], []
    sequences = load_sequences(ptx.path, "ptx.path", chat, config.train.micro_batch_tokens)
    overlap = find_overlap([chat.decode(sequence.token_ids) for sequence in sequences], eval_tasks)
    if overlap is not None:
        index, task, words = overlap
        raise ConfigError(
            f"{sequences[index].id} holds a part of evaluation task {task.id}: {words!r}; leave the chat "
            "out, or what is measured is learned by heart"
        )
    if not ptx.held_out:
        return sequences, []
    try:
        return held_out_of(sequences, ptx.held_out)
    except ValueError as error:
        raise ConfigError(f"ptx.held_out={ptx.held_out} with ptx.path={ptx.path}: {error}") from error

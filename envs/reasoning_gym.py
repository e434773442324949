"""Puzzles of the reasoning-gym package."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from gymnasium.error import ResetNeeded

from envs.base import ResetResult, StepResult, TextEnv
from k2rl.errors import ConfigError
from k2rl.types import Message, Split, Task

DEFAULT = (
    *("base_conversion", "caesar_cipher", "count_bits", "gcd", "isomorphic_strings", "largest_island", "lcm"),
    *("leg_counting", "letter_counting", "maze", "number_filtering", "number_sequence", "rotate_matrix"),
    *("simple_equations", "string_splitting", "syllogism", "word_sequence_reversal"),
)
EVAL_ONE_IN = 8
SYSTEM = "Solve the puzzle. End with a line that says nothing but: Answer: <your answer>"


class ReasoningGymEnv(TextEnv):
    """A puzzle of the reasoning-gym package, answered in one turn.

    The reward is the package's own score: 1 for the answer, less where it stands among other text. Only
    data sets with an answer in so many words are taken: what other scorers do with a text is not always safe.
    """

    kinds = ("puzzle",)

    def __init__(self, datasets: Sequence[str] | str | None = None) -> None:
        """`datasets`: names, a list or separated by commas.

        Raises:
            ConfigError: the package is not installed, or has no such data set with a plain answer.
        """
        super().__init__()
        names = datasets.split(",") if isinstance(datasets, str) else list(datasets or DEFAULT)
        known = _plain_datasets()
        for name in names:
            if name not in known:
                raise ConfigError(f"datasets: {name!r} is not one of: {', '.join(known)}")
        self.datasets = tuple(names)
        self._answer: str | None = None

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """The data sets in turn; a puzzle's text decides which split it belongs to."""
        import reasoning_gym

        sets = {name: reasoning_gym.create_dataset(name, seed=seed, size=2**31) for name in self.datasets}
        puzzles = {name: (data[index] for index in count()) for name, data in sets.items()}
        for place in count():
            name = self.datasets[place % len(self.datasets)]
            entry = next(entry for entry in puzzles[name] if _split_of(name, entry["question"]) == split)
            data = {"question": entry["question"], "answer": entry["answer"], "tags": [name]}
            id = f"reasoning_gym/{split}/{seed}/{place}"
            yield Task(id=id, env="reasoning_gym", kind="puzzle", split=split, seed=seed, data=data)

    def demonstration(self, task: Task) -> list[str]:
        return [f"Answer: {task.data['answer']}"]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> ResetResult:
        task = self.start_episode(seed, options)
        self._answer = task.data["answer"]
        return (Message("system", SYSTEM), Message("user", task.data["question"])), {"task": task}

    def step(self, action: str) -> StepResult:
        """Score the answer.

        Raises:
            gymnasium.error.ResetNeeded: if no episode is running.
        """
        if self._answer is None:
            raise ResetNeeded("the episode is over or was never begun: call reset()")
        right, self._answer = self._answer, None
        _, said, answer = action.rpartition("Answer:")
        answer = answer.strip()
        reward = 0.0
        if said and answer:
            # As the package's ProceduralDataset.score_answer does.
            reward = 1.0 if answer == right.strip() else len(right) / len(answer) if right in answer else 0.0
        components = {"answered": float(bool(said)), "exact": float(reward == 1.0)}
        return (), reward, True, False, {"reward_components": components}


def _plain_datasets() -> tuple[str, ...]:
    """The data sets that are scored by their answer's text.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        from reasoning_gym.dataset import ProceduralDataset
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError(f"reasoning_gym needs: pip install reasoning-gym==0.1.25 ({error})") from error
    plain = ProceduralDataset.score_answer
    return tuple(sorted(name for name, (kind, _) in DATASETS.items() if kind.score_answer is plain))


def _split_of(name: str, question: str) -> Split:
    digest = hashlib.sha256(f"{name}\n{question}".encode()).digest()
    return "eval" if int.from_bytes(digest[:4], "big") % EVAL_ONE_IN == 0 else "train"

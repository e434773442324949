"""Puzzles of the reasoning-gym package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from gymnasium.error import ResetNeeded

from envs.answers import split_of, stated
from envs.base import ResetResult, StepResult, TextEnv
from k2rl.errors import ConfigError
from k2rl.types import Message, Split, Task

DEFAULT = (
    *("base_conversion", "caesar_cipher", "count_bits", "gcd", "largest_island", "lcm", "leg_counting"),
    *("letter_counting", "maze", "number_filtering", "number_sequence", "rotate_matrix", "simple_equations"),
    *("string_splitting", "syllogism", "word_sequence_reversal"),
)
_EVALUATES = "its scorer evaluates what the policy writes as Python"
_HASHES = "its puzzles depend on the order of a set, which differs between processes"
_NO_ANSWER = "its puzzles have no answer that its scorer would take for one"
_RAISES = "its scorer raises on what a policy may write"
UNSOUND = {
    **dict.fromkeys(("binary_matrix", "countdown", "intermediate_integration", "n_queens"), _EVALUATES),
    **dict.fromkeys(("polynomial_multiplication", "puzzle24", "simple_integration"), _EVALUATES),
    **dict.fromkeys(("spiral_matrix", "string_insertion"), _EVALUATES),
    **dict.fromkeys(("isomorphic_strings", "knight_swap", "ransom_note", "word_ladder"), _HASHES),
    **dict.fromkeys(("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"), _NO_ANSWER),
    **dict.fromkeys(("coin_flip", "game_of_life", "prime_factorization"), _RAISES),
    "game_of_life_halting": "its scorer takes any text for a no",
    "composite": "it is made of others, which must be named",
}
"""Data sets that are not offered, and why: each was asked (tests/envs/test_reasoning_gym.py)."""
BLOCK = 1000
"""Puzzles drawn of a data set before it is seeded anew: some make all of theirs beforehand."""
SYSTEM = "Solve the puzzle. End with a line that says nothing but: Answer: <your answer>"


class ReasoningGymEnv(TextEnv):
    """A puzzle of the reasoning-gym package, answered in one turn.

    The reward is the package's own score, 1 for a right answer; some data sets give less for one that is
    partly right. Components: `answered` and `exact`.
    """

    kinds = ("puzzle",)

    def __init__(self, datasets: Sequence[str] | str | None = None) -> None:
        """`datasets`: names, a list or separated by commas, or `all` for every sound one.

        Raises:
            ConfigError: the package is not installed, has no such data set, or an unsound one.
        """
        super().__init__()
        known = sound_datasets()
        names = datasets.split(",") if isinstance(datasets, str) else list(datasets or DEFAULT)
        if names == ["all"]:
            names = list(known)
        for name in names:
            if name in UNSOUND:
                raise ConfigError(f"datasets: {name!r} cannot be trained on: {UNSOUND[name]}")
            if name not in known:
                raise ConfigError(f"datasets: {name!r} is not one of: all, {', '.join(known)}")
        self.datasets = tuple(names)
        self._puzzle: tuple[Any, dict[str, Any]] | None = None

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """The data sets in turn; a puzzle's text decides which split it belongs to."""
        puzzles = {name: _puzzles(name, split, seed) for name in self.datasets}
        for place in count():
            name = self.datasets[place % len(self.datasets)]
            data = next(puzzles[name])
            id = f"reasoning_gym/{split}/{seed}/{place}"
            yield Task(id=id, env="reasoning_gym", kind="puzzle", split=split, seed=seed, data=data)

    def demonstration(self, task: Task) -> list[str]:
        return [f"Answer: {task.data['answer']}"]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> ResetResult:
        """Draw the task's puzzle again, with all that its scorer wants to know.

        Raises:
            RuntimeError: another version of the package draws another puzzle.
        """
        task = self.start_episode(seed, options)
        data = _dataset(task.data["dataset"], task.data["seed"])
        entry = data[task.data["index"]]
        if entry["question"] != task.data["question"]:
            raise RuntimeError(f"task {task.id} was drawn with another version of reasoning-gym")
        self._puzzle = data, entry
        return (Message("system", SYSTEM), Message("user", entry["question"])), {"task": task}

    def step(self, action: str) -> StepResult:
        """Score the answer.

        Raises:
            gymnasium.error.ResetNeeded: if no episode is running.
        """
        if self._puzzle is None:
            raise ResetNeeded("the episode is over or was never begun: call reset()")
        (data, entry), self._puzzle = self._puzzle, None
        answer = stated(action)
        reward = 0.0 if answer is None else float(data.score_answer(answer, entry))
        components = {"answered": float(answer is not None), "exact": float(reward == 1.0)}
        return (), reward, True, False, {"reward_components": components}


def _puzzles(name: str, split: Split, seed: int) -> Iterator[dict[str, Any]]:
    """What tasks hold of a data set's puzzles of this split."""
    for block in count():
        block_seed = (seed + 7919 * block) % 2**31
        data = _dataset(name, block_seed)
        for index in range(BLOCK):
            entry = data[index]
            if split_of(f"{name}\n{entry['question']}") == split:
                drawn = {"dataset": name, "seed": block_seed, "index": index, "tags": [name]}
                yield {"question": entry["question"], "answer": entry["answer"], **drawn}


def _dataset(name: str, seed: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=seed, size=BLOCK)


def sound_datasets() -> tuple[str, ...]:
    """The data sets that can be trained on.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError(f"reasoning_gym needs: pip install reasoning-gym==0.1.25 ({error})") from error
    return tuple(sorted(name for name in DATASETS if name not in UNSOUND))

"""The reasoning-gym package: which of its data sets can be trained on, found by asking each of them."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from itertools import islice
from typing import Any

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

import envs
from envs.reasoning_gym import DEFAULT, UNSOUND, sound_datasets
from k2rl.errors import ConfigError

JUNK = (
    *(
        "",
        "no",
        "0",
        "-1",
        "1e999",
        "nan",
        "[]",
        "{}",
        "(",
        "1/0",
        "None",
        "\x00",
        "\ud800",
        "'",
        "1,2",
        "=",
        "A=1",
    ),
    *(
        "1 2\n3 4",
        "[[1]]",
        '{"a": [1]}',
        '{"1": [2]}',
        "[null]",
        "9" * 5000,
        "[" * 5000,
        "(1+" * 300,
        "\n" * 999,
    ),
)
#: In a scorer's source: it would run what the policy writes.
EVALUATING = re.compile(r"(?<![\w.])eval\(answer\)|parse_expr\(answer")
DRAW = """
import sys, json, reasoning_gym
for name in sys.argv[1:]:
    data = reasoning_gym.create_dataset(name, seed=3, size=1000)
    print("\n" + json.dumps([name, *[[data[i]["question"], str(data[i]["answer"])] for i in (0, 1, 999)]]))
"""
NAMES = [name for name in DATASETS if name != "composite"]


def drawn(hash_seed: str) -> dict[str, Any]:
    ran = subprocess.run(
        [sys.executable, "-c", DRAW, *NAMES],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith('["')]  # some print, too
    return {name: entries for name, *entries in map(json.loads, lines)}


def faults(name: str) -> list[str]:
    """What is wrong with a data set, as far as its own answers and scores show it."""
    data = reasoning_gym.create_dataset(name, seed=3, size=1000)
    found = ["evaluates"] * bool(EVALUATING.search(inspect.getsource(type(data))))
    for entry in (data[0], data[1]):
        if not isinstance(entry["answer"], str) or data.score_answer(entry["answer"], entry) != 1:
            return [*found, "no answer"]
        for answer in JUNK if not found else ():
            try:
                score = data.score_answer(answer, entry)
            except Exception:  # noqa: BLE001 - that is what is looked for
                return [*found, "raises"]
            if not 0 <= score <= 1 or (score == 1 and len(answer) > 50):
                found.append("scores junk")
    return found


@pytest.mark.slow
def test_unsound_data_sets_are_those_that_are_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {name for name in NAMES if faults(name)}
    first, second = drawn("1"), drawn("2")
    found |= {name for name in NAMES if first[name] != second[name]}
    assert found | {"composite"} == set(UNSOUND)


@pytest.mark.parametrize("name", ["gcd", "sudoku", "zebra_puzzles", "family_relationships", "tower_of_hanoi"])
def test_answers_earn_1_and_others_less(name: str, play: Any) -> None:
    env = envs.make("reasoning_gym", datasets=name)
    for task in islice(env.tasks("eval", 5), 2):
        assert task.data["tags"] == [name]
        assert play(env, task, env.demonstration(task)).reward == 1.0
        assert play(env, task, [task.data["answer"]]).components == {"answered": 0.0, "exact": 0.0}
        for answer in ("Answer:", "Answer: 0.0001", f"Answer: {'9' * 5000}"):
            assert play(env, task, [answer]).reward < 0.5


def test_the_default_is_sound_and_all_are_to_be_had() -> None:
    known = sound_datasets()
    assert set(DEFAULT) <= set(known)
    assert len(known) == len(DATASETS) - len(UNSOUND)
    assert envs.make("reasoning_gym", datasets="all").datasets == known  # type: ignore[attr-defined]


def test_what_cannot_be_had() -> None:
    with pytest.raises(ConfigError, match="'puzzle24' cannot be trained on: its scorer evaluates"):
        envs.make("reasoning_gym", datasets="gcd,puzzle24")
    with pytest.raises(ConfigError, match="'chess' is not one of: all, ab"):
        envs.make("reasoning_gym", datasets=["chess"])

"""Curated texts: some to learn from, some that a run never sees."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from k2rl.composition import compose
from k2rl.errors import ConfigError
from k2rl.preflight import Preflight, preflight

WARM = ("warm_start=easy", "warm_start.steps=3", "warm_start.demos_per_step=2", "warm_start.texts=4")

NOWHERE = "ptx.path=/nowhere.jsonl"


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Ten different chats, two of them twice."""
    lines = []
    for number in (*range(10), 0, 1):
        asked = {"role": "user", "content": f"Is {number} a number?"}
        lines.append({"messages": [asked, {"role": "assistant", "content": "Yes."}]})
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def prepare(path: Path, *overrides: str) -> Preflight:
    return preflight(compose(["experiment=tiny", f"ptx.path={path}", *overrides]))


def said(sequences: Any) -> set[tuple[int, ...]]:
    return {sequence.token_ids for sequence in sequences}


def test_held_out_texts_are_in_no_step_and_in_no_warm_start(chats: Path) -> None:
    with closing(prepare(chats, "ptx.held_out=3", "ptx.weight=0.1", *WARM)) as prepared:
        assert len(said(prepared.held_out)) == 3
        assert len(prepared.held_out) + len(prepared.ptx) == 12
        shown = [sequence for batch in prepared.warm_start for sequence in batch]
        steps = [sequence for step in range(1, 9) for sequence in prepared.corpus().sample(step)]
    assert [len(batch) for batch in prepared.warm_start] == [6, 6, 6]
    assert said(steps) == said(prepared.ptx)
    assert len(said(shown) & said(prepared.ptx)) >= 6
    assert not said(prepared.held_out) & (said(shown) | said(steps))


def test_without_a_ptx_loss_texts_are_held_out_and_none_is_learned(chats: Path) -> None:
    with closing(prepare(chats, "ptx.held_out=3", "ptx=none", f"ptx.path={chats}")) as prepared:
        assert len(said(prepared.held_out)) == 3
        assert prepared.corpus().sample(1) == []


def test_the_same_texts_are_held_out_whatever_the_seed_and_the_order(chats: Path, tmp_path: Path) -> None:
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("".join(reversed(chats.read_text().splitlines(keepends=True))))
    found = []
    for path, seed in ((chats, 0), (chats, 1), (backwards, 0)):
        with closing(prepare(path, "ptx.held_out=3", f"seed={seed}")) as prepared:
            found.append(said(prepared.held_out))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["ptx.held_out=10"],
            "ptx.held_out=10 with ptx.path=.*: there are 10 different chats",
        ),
        (["ptx.held_out=-1"], "ptx.held_out=-1 must be a finite number, at least 0"),
        (["warm_start.texts=4"], "warm_start.texts=4 does nothing with warm_start.steps=0"),
        (
            ["ptx.weight=0", "ptx.held_out=1", NOWHERE],
            "/nowhere.jsonl is not a file",
        ),
        (["ptx.weight=0", *WARM, NOWHERE], "/nowhere.jsonl is not a file"),
    ],
)
def test_what_cannot_be_is_one_line(chats: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as refused:
        prepare(chats, *overrides)
    assert "\n" not in str(refused.value)

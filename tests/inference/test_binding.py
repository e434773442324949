from __future__ import annotations

import os

import pytest

from k2rl.inference.vllm import _cpu_binding


@pytest.mark.parametrize(
    ("ranks", "binding"),
    [(1, "0,1,2,5,6"), (2, "0,1|2,5"), (5, "0|1|2|5|6"), (7, "0|1|2|5|6|0|1")],
)
def test_every_rank_has_cores(ranks: int, binding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {6, 5, 2, 1, 0})
    assert _cpu_binding("all", ranks) == binding


def test_a_setting_is_left_as_it_is() -> None:
    assert _cpu_binding("0-3|4-7", 2) == "0-3|4-7"

from __future__ import annotations

import pytest

from k2rl.inference.vllm import _cpu_binding


@pytest.mark.parametrize(
    ("ranks", "binding"),
    [(1, "0,1,2,5,6"), (2, "0,1|2,5"), (5, "0|1|2|5|6"), (7, "0|1|2|5|6|0|1")],
)
def test_every_rank_has_cores(ranks: int, binding: str) -> None:
    assert _cpu_binding("all", ranks, [0, 1, 2, 5, 6]) == binding


def test_a_setting_is_left_as_it_is() -> None:
    assert _cpu_binding("0-3|4-7", 2, [0]) == "0-3|4-7"

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2rl.evaluation.stats import Estimate
from k2rl.tracking.charts import (
    Bar,
    IntervalPoint,
    IntervalRow,
    Series,
    bar_rows,
    interval_chart,
    line_chart,
    nice_ticks,
    range_pair,
    seconds_text,
    time_ticks,
)

repeatable = settings(derandomize=True, deadline=None, max_examples=30)
finite = st.floats(-1e6, 1e6).map(lambda value: round(value, 6))


@repeatable
@given(finite, finite)
def test_ticks_enclose_the_values_and_grow(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high)
    span = ticks[-1] - ticks[0]
    assert ticks == sorted(set(ticks))
    assert 2 <= len(ticks) <= 12
    assert ticks[0] <= low + 1e-6 * span
    assert ticks[-1] >= high - 1e-6 * span


def test_ticks_are_round_numbers() -> None:
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert nice_ticks(0.9, 1.3, 4) == [0.9, 1, 1.1, 1.2, 1.3]
    assert nice_ticks(0, 2, 4, whole=True) == [0, 1, 2]


def test_time_ticks_are_times_people_use() -> None:
    assert time_ticks(65) == [0, 10, 20, 30, 40, 50, 60]
    assert [tick / 60 for tick in time_ticks(2000)] == [0, 5, 10, 15, 20, 25, 30]
    assert len(time_ticks(40 * 86400)) <= 11
    assert time_ticks(0.4)[-1] <= 0.4


@repeatable
@given(st.lists(st.tuples(st.integers(0, 500), finite), min_size=1, max_size=30), st.booleans())
def test_every_point_of_a_line_lies_inside_its_chart(
    points: list[tuple[int, float]], from_zero: bool
) -> None:
    svg = ET.fromstring(line_chart([Series("s", points, "c-train")], title="t", from_zero=from_zero))
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    (line,) = svg.iter("polyline")
    placed = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert len(placed) == len(points)
    assert all(0 <= x <= width and 0 <= y <= height - 30 for x, y in placed)


def test_a_higher_value_is_drawn_higher() -> None:
    svg = ET.fromstring(line_chart([Series("s", [(1, 0.2), (2, 0.8)], "c-train")], title="t"))
    (line,) = svg.iter("polyline")
    first, second = (pair.split(",") for pair in line.attrib["points"].split())
    assert float(second[0]) > float(first[0])
    assert float(second[1]) < float(first[1])


def test_a_chart_of_nothing_is_nothing() -> None:
    assert line_chart([Series("s", [], "c-train")], title="t") == ""
    assert interval_chart([], title="t") == ""
    assert bar_rows([], title="t") == ""
    assert bar_rows([("run", [])], title="t") == ""


def test_values_can_be_read_on_hover() -> None:
    point = IntervalPoint(5, Estimate(0.5, (0.4, 0.6), 9), "held out")
    line = line_chart([Series("reward", [(3, 0.25)], "c-train")], title="t", intervals=[point])
    titles = [element.text for element in ET.fromstring(line).iter("title")]
    assert titles == ["reward, step 3: 0.25", "held out: 0.5 [0.4, 0.6]"]


def test_an_interval_chart_places_means_inside_their_intervals() -> None:
    rows = [
        IntervalRow("before", "n = 9", Estimate(-0.2, (-0.3, 0.1), 9), "c-before"),
        IntervalRow("after", "n = 9", Estimate(0.5, (0.4, 0.6), 9), "c-after"),
    ]
    svg = ET.fromstring(interval_chart(rows, title="t", gain=(0, 1)))
    bars = [element for element in svg.iter("rect") if element.attrib["class"] == "interval"]
    dots = [float(element.attrib["cx"]) for element in svg.iter("circle")]
    assert len(bars) == len(dots) == 2
    for bar, dot in zip(bars, dots, strict=True):
        assert float(bar.attrib["x"]) < dot < float(bar.attrib["x"]) + float(bar.attrib["width"])
    (band,) = (element for element in svg.iter("rect") if element.attrib["class"] == "band")
    assert float(band.attrib["x"]) == dots[0]
    assert float(band.attrib["width"]) == pytest.approx(dots[1] - dots[0])


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", 'a"b', "a & b", "a'b"])
def test_labels_are_escaped(name: str) -> None:
    estimate = Estimate(0.5, (0.4, 0.6), 9)
    for svg in (
        line_chart([Series(name, [(1, 1.0)], "c-train")], title=name),
        interval_chart([IntervalRow(name, name, estimate, "c-base")], title=name),
        range_pair([(name, "c-base", estimate)], 0, 1),
        bar_rows([(name, [Bar(0, 1, "p0", name)])], title=name),
    ):
        assert any(name in (element.text or "") for element in ET.fromstring(svg).iter())
        assert "<script" not in svg


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (4.25, "4.25 s"),
        (59.6, "59.6 s"),
        (120, "2 min"),
        (1080, "18 min"),
        (3600, "1 h"),
        (3900, "1 h 5 min"),
    ],
)
def test_seconds_text(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text

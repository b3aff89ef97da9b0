"""Axes and drawings: where values lie, against positions worked out by hand."""

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from xml.etree.ElementTree import Element

import pytest

from osft_mcore.report.columns import Column, ColumnChart
from osft_mcore.report.lines import Guide, LineChart, Point, Series
from osft_mcore.report.scale import doubling, linear, logarithmic, nice_ticks, written
from osft_mcore.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH


def points(*values: float, first: float = 1) -> tuple[Point, ...]:
    return tuple(Point(x=first + i, y=value) for i, value in enumerate(values))


def chart(*series: Series, **options: object) -> LineChart:
    return LineChart(key="k", title="t<", y_name="y", series=series, **options)  # type: ignore[arg-type]


def drawn(svg: str) -> Element:
    return ET.fromstring(svg)


def line_of(root: Element, number: int = 0) -> list[tuple[float, float]]:
    text = root.findall("polyline")[number].attrib["points"]
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in text.split())]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, (0, 0.2, 0.4, 0.6, 0.8, 1)), (0, 65, (0, 20, 40, 60)), (-3, 3, (-2, 0, 2)),
        (0.6, 1.02, (0.6, 0.7, 0.8, 0.9, 1.0)), (0, 3.5e-6, (0, 1e-6, 2e-6, 3e-6)),
    ],
)  # fmt: skip
def test_round_labels(low: float, high: float, ticks: tuple[float, ...]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize("last", [1, 2, 3, 4, 7, 12, 13, 99, 12345])
def test_steps_are_whole(last: int) -> None:
    ticks = linear([0, last], start=0, end=1, whole=True, pad=0).ticks
    assert all(tick == round(tick) for tick in ticks)
    assert len(set(ticks)) == len(ticks) >= 2


def test_scales() -> None:
    assert linear([0, 4], start=10, end=50, pad=0)(1) == 20
    log = logarithmic([1e-5, 1e-1], start=0, end=4)
    assert log(1e-3) == pytest.approx(2)
    assert log.ticks == pytest.approx((1e-5, 1e-4, 1e-3, 1e-2, 1e-1))
    assert doubling([1, 2, 4, 8], start=0, end=3)(4) == pytest.approx(2)
    # 0 has no logarithm: it lies at the lower end, and nothing else does.
    with_zero = logarithmic([0.0, 1e-3, 1e-2], start=0, end=1)
    assert with_zero(0.0) == 0
    assert with_zero(1e-3) > 0


@pytest.mark.parametrize("value", [0.0, 5.0, -2.0, 1e-9])
def test_a_single_value_has_an_axis(value: float) -> None:
    scale = linear([value, value], start=0, end=1)
    assert 0 <= scale(value) <= 1
    assert scale.low < scale.high


def test_written() -> None:
    values = [0.0, 0.25, 12345.6, 2.5e7, 8.08239e-5, -0.5, math.nan]
    assert [written(value) for value in values] == [
        "0", "0.25", "12,346", "2.5e7", "8.082e-5", "-0.5", "not finite",
    ]  # fmt: skip
    assert written(0.59277, percent=True) == "59.3%"


def test_a_line_lies_where_its_values_are() -> None:
    root = drawn(chart(Series(name="a", points=points(0, 10, 5))).svg)
    [start, top, middle] = line_of(root)
    assert (start[0], middle[0]) == (LEFT, WIDTH - RIGHT)
    assert top[0] == pytest.approx((LEFT + WIDTH - RIGHT) / 2)
    assert start[1] == HEIGHT - BOTTOM
    assert TOP < top[1] < middle[1] < start[1]
    assert (start[1] - middle[1]) / (start[1] - top[1]) == pytest.approx(0.5, abs=0.01)
    assert len(root.findall("circle")) == 3


def test_a_band_has_both_bounds() -> None:
    inside = tuple(Point(x=x, y=5, low=4, high=8) for x in (1, 2))
    root = drawn(chart(Series(name="a", points=inside)).svg)
    (band,) = root.findall("polygon")
    levels = sorted({float(pair.split(",")[1]) for pair in band.attrib["points"].split()})
    assert len(levels) == 2
    ((_, level), _) = line_of(root)
    assert (level - levels[0]) / (levels[1] - levels[0]) == pytest.approx(0.75, abs=0.01)


def test_what_is_not_finite_is_a_gap() -> None:
    root = drawn(chart(Series(name="a", points=points(1, 2, math.nan, 3, math.inf, 4, 5))).svg)
    assert [len(line_of(root, i)) for i in range(3)] == [2, 1, 2]


def test_values_show_on_hover_at_every_place() -> None:
    one = Series(name="one", points=points(1, 2, 3))
    other = Series(name="other <b>", points=points(0.5, 0.25, first=2))
    root = drawn(chart(one, other).svg)
    told = [title.text for title in root.iter("title")]
    assert told == [
        "step 1\none: 1", "step 2\none: 2\nother <b>: 0.5", "step 3\none: 3\nother <b>: 0.25"
    ]  # fmt: skip
    stripes = [r.attrib for r in root.findall("rect")]
    for left, right in pairwise(stripes):
        end = float(left["x"]) + float(left["width"])
        assert end == pytest.approx(float(right["x"]), abs=0.11)


def test_many_points_share_places_and_keep_their_extremes() -> None:
    values = [0.0] * 20_000
    values[7_777] = 9.0
    svg = chart(Series(name="a", points=points(*values))).svg
    assert len(svg) < 150_000
    root = drawn(svg)
    assert max(HEIGHT - BOTTOM - y for _, y in line_of(root)) > 0.9 * (HEIGHT - BOTTOM - TOP)
    (spike,) = [t.text for t in root.iter("title") if t.text and "0 to 9" in t.text]
    first, last = (int(n.replace(",", "")) for n in re.findall(r"[\d,]+", spike)[:2])
    assert first <= 7_778 <= last


def test_a_guide_is_inside_and_named() -> None:
    high = Guide(name="limit & more", y=100.0)
    root = drawn(chart(Series(name="a", points=points(1, 2)), guides=(high,)).svg)
    group = root.find("g")
    assert group is not None
    assert TOP <= float(group.findall("line")[0].attrib["y1"]) < HEIGHT - BOTTOM
    assert group.findall("text")[0].text == "limit & more"


def test_columns_add_up() -> None:
    columns = (Column(name="1", values=(3.0, 1.0)), Column(name="2", values=(2.0, 2.0)))
    root = drawn(
        ColumnChart(
            key="k", title="t", y_name="s", x_name="step", parts=("a", "b"), columns=columns
        ).svg
    )
    bars = [r.attrib for r in root.findall("rect") if "bar" in r.attrib["class"]]
    heights = [float(bar["height"]) for bar in bars]
    assert heights[0] == pytest.approx(3 * heights[1], rel=0.01)
    assert heights[2] == pytest.approx(heights[3], rel=0.01)
    assert float(bars[0]["y"]) == pytest.approx(float(bars[1]["y"]) + heights[1], abs=0.02)
    assert next(t.text for t in root.iter("title")) == "step 1\ntogether: 4\na: 3\nb: 1"

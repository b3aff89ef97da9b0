"""Lines with bands as inline SVG whose values show on hover; pure."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from osft_mcore.report.scale import Scale, doubling, linear, logarithmic, written
from osft_mcore.report.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    NUM_COLOURS,
    RIGHT,
    TOP,
    WIDTH,
    axes,
    stripe,
    svg,
)

MAX_COLUMNS = 240
"""Places to hover over; more points share them, and say from where to where they go."""
MAX_MARKED = 40
"""A line of so many points shows each of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A value, and between what it may lie."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line. Points that are not finite are gaps; one without bounds has no band."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """A level to compare with."""

    name: str
    y: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LineChart:
    """What is drawn, and how its axes are."""

    key: str
    """Names the chart in the page."""
    title: str
    y_name: str
    """With its unit."""
    x_name: str = "step"
    series: tuple[Series, ...]
    guides: tuple[Guide, ...] = ()
    log: bool = False
    percent: bool = False
    whole_x: bool = True
    doubling_x: bool = False
    note: str = ""

    @property
    def svg(self) -> Markup:
        """The drawing."""
        return _line_svg(self)


def _line_svg(chart: LineChart) -> Markup:
    drawn = [[point for point in series.points if _finite(point)] for series in chart.series]
    points = [point for line in drawn for point in line]
    assert points, f"{chart.key}: a chart needs a finite value"
    x, y = _x_scale(chart, points), _y_scale(chart, points)
    body = [axes(x, y, x_name=chart.x_name, y_name=chart.y_name, percent=chart.percent)]
    for number, series in enumerate(chart.series):
        for part in _unbroken(series.points):
            body += [_band(part, number, x, y), _line(part, number, x, y, len(series.points))]
    body += [_guide(guide, y) for guide in chart.guides]
    body += _hover_columns(chart, x)
    return svg(chart.title, body)


def _x_scale(chart: LineChart, points: Sequence[Point]) -> Scale:
    values, start, end = [point.x for point in points], LEFT, WIDTH - RIGHT
    if chart.doubling_x:
        return doubling(values, start=start, end=end)
    return linear(values, start=start, end=end, whole=chart.whole_x, pad=0)


def _y_scale(chart: LineChart, points: Sequence[Point]) -> Scale:
    values = [v for p in points for v in (p.y, p.low, p.high) if v is not None and math.isfinite(v)]
    values += [guide.y for guide in chart.guides]
    return (logarithmic if chart.log else linear)(values, start=HEIGHT - BOTTOM, end=TOP)


def _finite(point: Point) -> bool:
    return math.isfinite(point.x) and math.isfinite(point.y)


def _unbroken(points: Sequence[Point]) -> Iterator[list[Point]]:
    """The pieces of a line between values that are not finite."""
    part: list[Point] = []
    for point in points:
        if _finite(point):
            part.append(point)
        elif part:
            yield part
            part = []
    if part:
        yield part


def _line(points: Sequence[Point], number: int, x: Scale, y: Scale, num_points: int) -> Markup:
    colour = f"c{number % NUM_COLOURS} d{number // NUM_COLOURS}"
    path = Markup(" ").join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in _thinned(points, x))
    line = Markup('<polyline class="line {}" points="{}"/>').format(colour, path)
    if num_points > MAX_MARKED and len(points) > 1:
        return line
    dots = (
        Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(
            colour, x(p.x), y(p.y), 2.6 if num_points > 1 else 4.5
        )
        for p in points
    )
    return line + Markup("").join(dots)


def _thinned(points: Sequence[Point], x: Scale) -> Iterator[Point]:
    """As many as can be seen: of the points in half a unit of width the lowest and the highest."""
    groups: dict[int, list[Point]] = {}
    for point in points:
        groups.setdefault(int(2 * x(point.x)), []).append(point)
    for group in groups.values():
        ends = {min(group, key=lambda p: p.y), max(group, key=lambda p: p.y)}
        yield from sorted(ends, key=lambda p: p.x)


def _band(points: Sequence[Point], number: int, x: Scale, y: Scale) -> Markup:
    inside = [
        (x(p.x), y(p.low), y(p.high))
        for p in points
        if p.low is not None and p.high is not None and math.isfinite(p.low + p.high)
    ]
    if not inside:
        return Markup("")
    if len(inside) == 1:
        at, low, high = inside[0]
        inside = [(at - 3, low, high), (at + 3, low, high)]
    edge = [(at, high) for at, _, high in inside] + [(at, low) for at, low, _ in inside[::-1]]
    return Markup('<polygon class="band c{}" points="{}"/>').format(
        number % NUM_COLOURS, " ".join(f"{at:.1f},{level:.1f}" for at, level in edge)
    )


def _guide(guide: Guide, y: Scale) -> Markup:
    at = y(guide.y)
    # Above the level, unless that is outside.
    text_y = at + 14 if at < TOP + 14 else at - 5
    return Markup(
        '<g class="guide"><line x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
        '<text x="{}" y="{:.1f}">{}</text></g>'
    ).format(LEFT, WIDTH - RIGHT, at, at, LEFT + 4, text_y, guide.name)


def _hover_columns(chart: LineChart, x: Scale) -> Iterator[Markup]:
    """Invisible stripes, one for each place on the x axis, that tell all values there."""
    by_x: dict[float, list[str]] = {}
    places = sorted({p.x for series in chart.series for p in series.points if math.isfinite(p.x)})
    size = math.ceil(len(places) / MAX_COLUMNS)
    groups = [places[i : i + size] for i in range(0, len(places), size)]
    group_of = {place: group[0] for group in groups for place in group}
    for series in chart.series:
        found: dict[float, list[Point]] = {}
        for point in series.points:
            if math.isfinite(point.x):
                found.setdefault(group_of[point.x], []).append(point)
        for place, points in found.items():
            by_x.setdefault(place, []).append(f"{series.name}: {_told(points, chart.percent)}")
    centres = [x(group[len(group) // 2]) for group in groups]
    edges = [LEFT - 4.0, *((a + b) / 2 for a, b in pairwise(centres))]
    edges.append(WIDTH - RIGHT + 4.0)
    for group, left, right in zip(groups, edges[:-1], edges[1:], strict=True):
        here = written(group[0]) + (f" to {written(group[-1])}" if len(group) > 1 else "")
        yield stripe(left, right, [f"{chart.x_name} {here}", *by_x[group[0]]])


def _told(points: Sequence[Point], percent: bool) -> str:
    def text(value: float) -> str:
        return written(value, percent=percent)

    if len(points) > 1:
        values = [point.y for point in points if math.isfinite(point.y)]
        return f"{text(min(values))} to {text(max(values))}" if values else "not finite"
    (point,) = points
    if point.low is None or point.high is None:
        return text(point.y)
    return f"{text(point.y)} ({text(point.low)} to {text(point.high)})"

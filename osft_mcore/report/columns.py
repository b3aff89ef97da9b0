"""Stacked columns as inline SVG whose values show on hover; pure."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from osft_mcore.report.scale import Scale, linear, written
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One stack: a value for each part, in the order of the chart's parts."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnChart:
    """Columns of parts that add up."""

    key: str
    title: str
    y_name: str
    x_name: str
    parts: tuple[str, ...]
    columns: tuple[Column, ...]
    note: str = ""

    @property
    def svg(self) -> Markup:
        """The drawing."""
        return _column_svg(self)


def _column_svg(chart: ColumnChart) -> Markup:
    totals = [sum(column.values) for column in chart.columns]
    y = linear([0.0, *totals], start=HEIGHT - BOTTOM, end=TOP)
    width = (WIDTH - LEFT - RIGHT) / len(chart.columns)

    def centre(number: float) -> float:
        return LEFT + (number + 0.5) * width

    body = [_column_axes(chart, y, centre)]
    for number, (column, total) in enumerate(zip(chart.columns, totals, strict=True)):
        below = 0.0
        for part, value in enumerate(column.values):
            box = (centre(number) - 0.42 * width, y(below + value), 0.84 * width)
            body.append(
                Markup(
                    '<rect class="bar c{}" x="{:.1f}" y="{:.2f}" width="{:.1f}" height="{:.2f}"/>'
                ).format(part % NUM_COLOURS, *box, y(below) - y(below + value))
            )
            below += value
        told = [f"{name}: {written(v)}" for name, v in zip(chart.parts, column.values, strict=True)]
        body.append(
            stripe(
                LEFT + number * width,
                LEFT + (number + 1) * width,
                [f"{chart.x_name} {column.name}", f"together: {written(total)}", *told],
            )
        )
    return svg(chart.title, body)


def _column_axes(chart: ColumnChart, y: Scale, centre: Callable[[float], float]) -> Markup:
    every = math.ceil(len(chart.columns) / 12)
    names = [
        Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            centre(number), HEIGHT - BOTTOM + 17, column.name
        )
        for number, column in enumerate(chart.columns)
        if number % every == 0
    ]
    nowhere = Scale(low=0, high=1, start=LEFT, end=WIDTH - RIGHT, ticks=())
    around = axes(nowhere, y, x_name=chart.x_name, y_name=chart.y_name, percent=False)
    return around + Markup("").join(names)

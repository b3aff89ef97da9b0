"""The paper of a chart: axes, stripes to hover over, the element around; pure."""

from collections.abc import Sequence

from markupsafe import Markup, escape

from osft_mcore.report.scale import Scale, written

WIDTH, HEIGHT = 560, 270
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 26, 38
NUM_COLOURS = 8
"""The page's style has as many; a later series looks like an earlier one, but for its dashes."""


def stripe(left: float, right: float, lines: Sequence[str]) -> Markup:
    """An invisible piece of the drawing that tells `lines` to who hovers over it."""
    return Markup(
        '<rect class="hit" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>'
    ).format(left, TOP, max(right - left, 0.1), HEIGHT - TOP - BOTTOM, "\n".join(lines))


def axes(x: Scale, y: Scale, *, x_name: str, y_name: str, percent: bool) -> Markup:
    """Both axes with their labels, and a line for every label of y."""
    lines = [
        Markup(
            '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
            '<text x="{}" y="{:.1f}" text-anchor="end">{}</text>'
        ).format(
            LEFT, WIDTH - RIGHT, y(tick), y(tick), LEFT - 7, y(tick) + 4,
            written(tick, percent=percent),
        )
        for tick in y.ticks
    ]  # fmt: skip
    lines += [
        Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            x(tick), HEIGHT - BOTTOM + 17, written(tick)
        )
        for tick in x.ticks
    ]
    return Markup("").join([*lines, _frame(x_name, y_name)])


def _frame(x_name: str, y_name: str) -> Markup:
    return Markup(
        '<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>'
        '<text class="name" x="{}" y="14">{}</text>'
        '<text class="name" x="{}" y="{}" text-anchor="end">{}</text>'
    ).format(
        LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, HEIGHT - BOTTOM, 4, y_name, WIDTH - RIGHT,
        HEIGHT - 5, x_name,
    )  # fmt: skip


def svg(title: str, body: Sequence[Markup]) -> Markup:
    """The element that holds a drawing."""
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, escape(title), Markup("").join(body)
    )

"""Charts of how sure the model was of its answers to held-out problems."""

import re
from collections.abc import Iterator
from typing import Final

from osft_mcore.report.lines import LineChart, Point, Series
from osft_mcore.report.run import Run, finite
from osft_mcore.report.scores import MAX_LINES

_METRIC: Final = re.compile(r"eval/(.+)/probe_entropy_mean")


def probe_charts(run: Run, temperature: float | None) -> Iterator[LineChart]:
    """Entropy over steps, a line for each benchmark; nothing if there is only one step."""
    points: dict[str, list[Point]] = {}
    for row in run.evaluations:
        if finite(row, "eval/temperature") != temperature:
            continue
        for name in row:
            value = finite(row, name)
            if (match := _METRIC.fullmatch(name)) and value is not None:
                points.setdefault(match[1], []).append(Point(x=row["step"], y=value))
    if len({point.x for found in points.values() for point in found}) < 2:
        return
    left_out = list(points)[MAX_LINES:]
    yield LineChart(
        key="probe-entropy",
        title="Entropy of the model on its answers to held-out problems",
        y_name="nats",
        series=tuple(
            Series(name=source, points=tuple(found))
            for source, found in list(points.items())[:MAX_LINES]
        ),
        note=f"temperature {temperature:g}"
        + (f"; not shown: {', '.join(left_out)}" if left_out else ""),
    )

"""The ablation's figures: means and intervals over seeds, and what they say of an order; pure."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

T_975: Final = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}
"""97.5% quantiles of Student's t by degrees of freedom."""

ORDERS: Final = (("OSFT", "coupled"), ("OSFT", "offline"), ("OSFT", "EM-FT"))
"""What the paper found: the first above the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A mean over seeds; the bounds are its 95% interval by Student's t."""

    mean: float
    low: float
    high: float


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """Of one figure a seed, for 2 to 9 seeds."""
    mean = statistics.fmean(values)
    half = T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return Mean(mean=mean, low=mean - half, high=mean + half)


def verdict(above: Sequence[float], below: Sequence[float]) -> tuple[Mean, str]:
    """The difference of two methods, seed by seed, and whether the first is above the second."""
    found = mean_over_seeds([a - b for a, b in zip(above, below, strict=True)])
    if found.low > 0:
        return found, "holds"
    return found, "is reversed" if found.high < 0 else "is not decided"


def report(base: Mapping[str, float], scores: Mapping[str, Sequence[float]]) -> str:
    """The table as Markdown.

    `base`: pass@1 of the starting model by temperature; `scores`: of each method one a seed, at
    temperature 1.
    """
    best = max(base, key=base.__getitem__)
    rows = [
        ("base", "1", base["1"], "", ""),
        ("base, best temperature", best, base[best], "", ""),
    ]
    for method, values in scores.items():
        found = mean_over_seeds(values)
        each = ", ".join(_percent(value) for value in values)
        rows.append(
            (method, "1", found.mean, f"{_percent(found.low)} to {_percent(found.high)}", each)
        )
    lines = [
        "| method | temperature | pass@1 | 95% interval | each seed |",
        "|---|---|---|---|---|",
        *(f"| {m} | {t} | {_percent(p)} | {i} | {e} |" for m, t, p, i, e in rows),
        "",
        "| order | difference, points | 95% interval | |",
        "|---|---|---|---|",
    ]
    for above, below in ORDERS:
        gap, said = verdict(scores[above], scores[below])
        around = f"{100 * gap.low:+.1f} to {100 * gap.high:+.1f}"
        lines.append(f"| {above} > {below} | {100 * gap.mean:+.1f} | {around} | {said} |")
    return "\n".join(lines) + "\n"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"

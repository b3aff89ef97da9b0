"""Where values lie on an axis, and how they are written; pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_DECADES = 6
"""Labels on a logarithmic axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Values from `low` to `high` on positions from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        """Position of a value; what lies outside is at the nearer end."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low))
        share = (value - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def linear(
    values: Sequence[float], *, start: float, end: float, whole: bool = False, pad: float = 0.06
) -> Scale:
    """An axis that holds all values; from 0 on where that costs little. `whole`: numbers only."""
    low, high = min(values), max(values)
    if low == high:
        room = 1.0 if whole else abs(low) * 0.5 or 1.0
        low, high = (low - room, high + room) if low else (0.0, room)
    elif pad:
        if 0 <= low < 0.4 * high:
            low = 0.0
        else:
            room = (high - low) * pad
            low, high = (0.0 if 0 <= low < room else low - room), high + room
        high += (high - low) * pad
    ticks = nice_ticks(low, high, least=1.0 if whole else 0.0)
    return Scale(low=low, high=high, start=start, end=end, ticks=ticks)


def logarithmic(values: Sequence[float], *, start: float, end: float) -> Scale:
    """Whole decades around all positive values; what is not positive lies at the lower end."""
    positive = [value for value in values if value > 0] or [1.0]
    first = math.floor(math.log10(min(positive)) + 1e-9)
    last = math.ceil(math.log10(max(positive)) - 1e-9)
    if len(positive) < len(values) or first == last:
        first -= 1
    every = max(1, math.ceil((last - first) / MAX_DECADES))
    ticks = tuple(10.0**power for power in range(first, last + 1, every))
    return Scale(low=10.0**first, high=10.0**last, start=start, end=end, ticks=ticks, log=True)


def doubling(values: Sequence[float], *, start: float, end: float) -> Scale:
    """An axis for 1, 2, 4, ...; every value gets a label."""
    ticks = tuple(sorted(set(values)))
    low, high = ticks[0], ticks[-1] if len(ticks) > 1 else 2 * ticks[0]
    return Scale(low=low, high=high, start=start, end=end, ticks=ticks, log=True)


def nice_ticks(
    low: float, high: float, *, least: float = 0.0, number: int = 5
) -> tuple[float, ...]:
    """About `number` round values from low to high, at least `least` apart."""
    rough = max((high - low) / number, least)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    if least and step == 2.5 * least:
        step = 5 * least
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    # `+ 0.0` makes 0 of -0.
    return tuple(round(i * step, 12) + 0.0 for i in range(first, last + 1))


def written(value: float, *, percent: bool = False) -> str:
    """Four digits, which is what a reader takes in."""
    if not math.isfinite(value):
        return "not finite"
    if percent:
        return f"{100 * value:.3g}%"
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        mantissa, power = f"{value:.3e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

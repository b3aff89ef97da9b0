"""How one parameter is laid out: an ordered run of intervals of Hugging Face tensors."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from osft_mcore.errors import WeightError


@dataclass(frozen=True, slots=True)
class Interval:
    """Rows [start, stop) of one Hugging Face tensor, along the dim of its layout.

    `tensor` None is padding: rows that exist on no other side and hold zeros.
    """

    tensor: str | None
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of rows."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a parameter of `shape` holds: `intervals`, one after the other along `dim`.

    A "row" is one index along `dim`, whichever dim that is. Raises WeightError if the intervals
    do not fill the shape.
    """

    shape: tuple[int, ...]
    dim: int
    intervals: tuple[Interval, ...]

    def __post_init__(self) -> None:
        num_rows = sum(interval.length for interval in self.intervals)
        if not 0 <= self.dim < len(self.shape) or num_rows != self.shape[self.dim]:
            raise WeightError(
                f"a parameter of shape {self.shape} cannot hold {num_rows} rows along "
                f"dim {self.dim}: {self.intervals}"
            )

    @property
    def cross_shape(self) -> tuple[int, ...]:
        """The shape without `dim`: both sides of a copy must agree on it."""
        return self.shape[: self.dim] + self.shape[self.dim + 1 :]

    @property
    def row_elements(self) -> int:
        """Elements in one row."""
        return prod(self.cross_shape)

    def located(self) -> list[tuple[int, Interval]]:
        """Each interval with its first row in the parameter."""
        starts = accumulate((interval.length for interval in self.intervals), initial=0)
        return list(zip(starts, self.intervals, strict=False))


Layouts = Mapping[int, Mapping[str, Layout]]
"""Rank -> parameter name -> layout: one side of a plan."""


def whole(tensor: str, num_rows: int) -> tuple[Interval, ...]:
    """All rows of a tensor."""
    return (Interval(tensor, 0, num_rows),)


def merged(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """The same rows of tensors, each once, sorted, in as few intervals as possible."""
    runs: list[Interval] = []
    held = [interval for interval in intervals if interval.tensor is not None]
    for interval in sorted(held, key=lambda at: (at.tensor, at.start, at.stop)):
        last = runs[-1] if runs else None
        if last is not None and last.tensor == interval.tensor and interval.start <= last.stop:
            runs[-1] = Interval(last.tensor, last.start, max(last.stop, interval.stop))
        else:
            runs.append(interval)
    return tuple(runs)


def padded(tensor: str, num_rows: int, total: int) -> tuple[Interval, ...]:
    """All rows of a tensor, then padding up to `total`. Raises WeightError if they do not fit."""
    if total < num_rows:
        raise WeightError(f"{tensor!r} has {num_rows} rows, more than the padded size {total}")
    padding = (Interval(None, 0, total - num_rows),) if total > num_rows else ()
    return (*whole(tensor, num_rows), *padding)


def cut(intervals: tuple[Interval, ...], index: int, parts: int) -> tuple[Interval, ...]:
    """Part `index` of `parts` equal parts of a run of intervals, cutting through them if need be.

    Raises WeightError if the rows do not divide.
    """
    num_rows = sum(interval.length for interval in intervals)
    if num_rows % parts or not 0 <= index < parts:
        names = sorted({interval.tensor for interval in intervals if interval.tensor is not None})
        raise WeightError(
            f"cannot take part {index} of {parts} equal parts of the {num_rows} rows of "
            f"{', '.join(names)}; choose a parallel size that divides them"
        )
    begin, end = index * num_rows // parts, (index + 1) * num_rows // parts
    pieces = []
    at = 0
    for interval in intervals:
        low, high = max(begin, at), min(end, at + interval.length)
        if low < high:
            shift = interval.start - at
            pieces.append(Interval(interval.tensor, low + shift, high + shift))
        at += interval.length
    return tuple(pieces)

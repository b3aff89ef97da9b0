"""What a plan moves, rank by rank, against the least that any plan could."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from osft_mcore.weights.layout import Interval, Layout, Layouts, merged
from osft_mcore.weights.plan import ReshardPlan

Span = tuple[int, int]
"""Rows [start, stop)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBytes:
    """One rank's part in a push, in bytes."""

    rank: int
    sent: int
    received: int
    least: int
    """The part of this rank's target that it does not hold itself."""
    local: int
    """Copied within the rank."""
    aliased: int
    """Not copied at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanBytes:
    """A whole push, in bytes."""

    num_copies: int
    ranks: tuple[RankBytes, ...]

    @property
    def received(self) -> int:
        """Over all ranks."""
        return sum(rank.received for rank in self.ranks)

    @property
    def least(self) -> int:
        """The lower bound of `received`."""
        return sum(rank.least for rank in self.ranks)

    @property
    def ratio(self) -> float:
        """received / least; 1 if nothing has to move and nothing does."""
        return self.received / self.least if self.least else 1.0 + self.received

    @property
    def imbalance(self) -> float:
        """What the busiest sender sends, over the mean of all ranks; 1 is even."""
        sent = [rank.sent for rank in self.ranks]
        return max(sent) * len(sent) / sum(sent) if any(sent) else 1.0


def plan_bytes(
    plan: ReshardPlan, sources: Layouts, targets: Layouts, *, itemsize: int
) -> PlanBytes:
    """Count what `plan` moves and hold it against the lower bound; `itemsize` bytes an element."""
    least = missing_elements(sources, targets)
    return PlanBytes(
        num_copies=len(plan.copies),
        ranks=tuple(
            RankBytes(
                rank=rank,
                sent=moved.sent * itemsize,
                received=moved.received * itemsize,
                least=least.get(rank, 0) * itemsize,
                local=moved.local * itemsize,
                aliased=moved.aliased * itemsize,
            )
            for rank, moved in plan.traffic().items()
        ),
    )


def missing_elements(sources: Layouts, targets: Layouts) -> dict[int, int]:
    """By target rank: elements of its targets, each once, that its own sources do not hold.

    Computed from the layouts alone, not from a plan, so that a plan can be held against it.
    """
    missing = {}
    for rank, layouts in targets.items():
        held = _spans(sources.get(rank, {}))
        missing[rank] = sum(
            row_elements * _num_rows_outside(wanted, held.get((tensor, row_elements), []))
            for (tensor, row_elements), wanted in _spans(layouts).items()
        )
    return missing


def _spans(layouts: Mapping[str, Layout]) -> dict[tuple[str, int], list[Span]]:
    """The rows that these parameters hold, by tensor and elements in a row, merged and sorted."""
    by_width: dict[int, list[Interval]] = defaultdict(list)
    for layout in layouts.values():
        by_width[layout.row_elements] += layout.intervals
    found: dict[tuple[str, int], list[Span]] = defaultdict(list)
    for width, intervals in by_width.items():
        for interval in merged(intervals):
            assert interval.tensor is not None, "padding is no part of a merged run"
            found[interval.tensor, width].append((interval.start, interval.stop))
    return found


def _num_rows_outside(wanted: Iterable[Span], held: Iterable[Span]) -> int:
    """Rows of `wanted` that are not in `held`; both merged."""
    inside = list(held)
    return sum(
        (stop - start) - sum(max(0, min(stop, high) - max(start, low)) for low, high in inside)
        for start, stop in wanted
    )

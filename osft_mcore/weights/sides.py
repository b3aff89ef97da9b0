"""What two sides of a plan must have in common, whatever their layouts."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate

from osft_mcore.errors import WeightError
from osft_mcore.weights.layout import Layouts


def check_sides(sources: Layouts, targets: Layouts) -> None:
    """Raise WeightError, naming the tensors, unless both sides hold the same ones, evenly.

    Evenly: all rows of a tensor equally often over the ranks of a side, as every parallel layout
    does. A parameter left out, or an interval that is off by a row, breaks this.
    """
    held, wanted = _rows(sources), _rows(targets)
    problems = [
        *_uneven("actor", held),
        *_uneven("engine", wanted),
        *(f"{name!r} reaches no parameter of the engine" for name in held if name not in wanted),
        *(f"{name!r} is held by no parameter of the actor" for name in wanted if name not in held),
    ]
    for name in held.keys() & wanted.keys():
        found, expected = (max(side[name]) for side in (wanted, held))
        if found != expected:
            problems.append(f"{name!r} has {expected} rows in the actor, {found} in the engine")
    if problems:
        raise WeightError("\n".join(problems))


def _rows(side: Layouts) -> dict[str, dict[int, int]]:
    """By tensor: at which rows the number of holders changes, and by how much."""
    changes: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for layouts in side.values():
        for layout in layouts.values():
            for interval in layout.intervals:
                if interval.tensor is not None and interval.length:
                    changes[interval.tensor][interval.start] += 1
                    changes[interval.tensor][interval.stop] -= 1
    return changes


def _uneven(side: str, rows: dict[str, dict[int, int]]) -> Iterator[str]:
    for name, changes in rows.items():
        starts = sorted({0, *(row for row, change in changes.items() if change)})
        counts = list(accumulate(changes.get(row, 0) for row in starts))
        runs = list(zip(starts, starts[1:], counts, strict=False))
        if len(runs) != 1 or not runs[0][2]:
            found = ", ".join(f"rows {start}:{stop} {n} times" for start, stop, n in runs)
            yield f"the {side}'s ranks hold {name!r} unevenly ({found}): its layout is wrong"

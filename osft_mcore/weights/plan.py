"""The reshard plan: which rows go from which rank to which, as the intersection of layouts."""

import hashlib
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from osft_mcore.errors import WeightError
from osft_mcore.weights.alias import Alias
from osft_mcore.weights.layout import Layouts

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """dst[dst_start : dst_start + length] = src[src_start : src_start + length], along `dim`."""

    src_rank: int
    src_param: str
    src_start: int
    dst_rank: int
    dst_param: str
    dst_start: int
    length: int
    dim: int
    row_elements: int

    @property
    def num_elements(self) -> int:
        """Elements that move."""
        return self.length * self.row_elements


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """Destination rows that no source holds: they become zero."""

    rank: int
    param: str
    start: int
    length: int
    dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one rank moves, in elements."""

    sent: int
    received: int
    local: int
    aliased: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardPlan:
    """Every copy that fills the targets; a pure value, the same on every rank."""

    copies: tuple[Copy, ...]
    """Ordered by destination rank, parameter (as given), first row."""
    paddings: tuple[Padding, ...]
    aliases: tuple[Alias, ...]
    """Target parameters that are filled by being a source parameter."""
    source_shapes: Mapping[int, Shapes]
    target_shapes: Mapping[int, Shapes]
    digest: str
    """SHA-256 over all of the above; ranks with equal digests agree on every message."""

    def traffic(self) -> dict[int, Traffic]:
        """Elements sent, received, copied locally and aliased, by rank."""
        sent: Counter[int] = Counter()
        received: Counter[int] = Counter()
        local: Counter[int] = Counter()
        aliased: Counter[int] = Counter()
        for copy in self.copies:
            if copy.src_rank == copy.dst_rank:
                local[copy.src_rank] += copy.num_elements
            else:
                sent[copy.src_rank] += copy.num_elements
                received[copy.dst_rank] += copy.num_elements
        for alias in self.aliases:
            aliased[alias.rank] += prod(self.target_shapes[alias.rank][alias.dst_param])
        return {
            rank: Traffic(
                sent=sent[rank],
                received=received[rank],
                local=local[rank],
                aliased=aliased[rank],
            )
            for rank in sorted({*self.source_shapes, *self.target_shapes})
        }


def make_plan(
    sources: Layouts, targets: Layouts, *, aliases: tuple[Alias, ...] = ()
) -> ReshardPlan:
    """Fill every row of `targets` from `sources`; `aliases` (see find_aliases) need no copy.

    Of several ranks that hold the same rows, the destination itself is taken, otherwise the one
    that sends least so far. Raises WeightError, naming all of them, if rows have no source or if
    the two sides cut a tensor along different dims.
    """
    held = _index(sources)
    copied = _without(targets, aliases)
    wants, paddings = _wants(held, copied)
    copies = _coalesced(wants, _chosen(wants))
    _check_covered(copied, copies, paddings)
    source_shapes, target_shapes = _shapes(sources), _shapes(targets)
    digest = _digest((*copies, *paddings, *aliases), source_shapes, target_shapes)
    return ReshardPlan(
        copies=copies,
        paddings=paddings,
        aliases=aliases,
        source_shapes=source_shapes,
        target_shapes=target_shapes,
        digest=digest,
    )


def _without(targets: Layouts, aliases: Sequence[Alias]) -> Layouts:
    """The targets that have to be written."""
    aliased = {(alias.rank, alias.dst_param) for alias in aliases}
    return {
        rank: {name: layout for name, layout in layouts.items() if (rank, name) not in aliased}
        for rank, layouts in targets.items()
    }


@dataclass(frozen=True, slots=True)
class _Holder:
    rank: int
    param: str
    shift: int
    """Row of the parameter minus row of the tensor."""


@dataclass(slots=True)
class _Held:
    """Who holds which rows of one tensor, in elementary segments between sorted bounds."""

    dim: int
    cross_shape: tuple[int, ...]
    bounds: list[int]
    holders: list[list[_Holder]]
    """holders[i] hold rows bounds[i] : bounds[i + 1]."""


@dataclass(frozen=True, slots=True)
class _Want:
    """Some rows of a destination parameter, and everyone who holds them."""

    rank: int
    param: str
    start: int
    row: int
    """First row in the tensor."""
    length: int
    dim: int
    row_elements: int
    holders: Sequence[_Holder]


def _index(sources: Layouts) -> dict[str, _Held]:
    spans: dict[str, list[tuple[int, int, _Holder]]] = defaultdict(list)
    cuts: dict[str, tuple[int, tuple[int, ...]]] = {}
    problems = []
    for rank in sorted(sources):
        for name, layout in sources[rank].items():
            for at, interval in layout.located():
                if interval.tensor is None:
                    continue
                mine = (layout.dim, layout.cross_shape)
                if cuts.setdefault(interval.tensor, mine) != mine:
                    problems.append(_differs(interval.tensor, cuts[interval.tensor], name, mine))
                holder = _Holder(rank, name, at - interval.start)
                spans[interval.tensor].append((interval.start, interval.stop, holder))
    if problems:
        raise WeightError("\n".join(problems))
    held = {}
    for tensor, rows in spans.items():
        bounds = sorted({edge for start, stop, _ in rows for edge in (start, stop)})
        holders: list[list[_Holder]] = [[] for _ in bounds[1:]]
        for start, stop, holder in rows:
            for segment in range(bisect_left(bounds, start), bisect_left(bounds, stop)):
                holders[segment].append(holder)
        held[tensor] = _Held(*cuts[tensor], bounds, holders)
    return held


def _differs(
    tensor: str,
    expected: tuple[int, tuple[int, ...]],
    param: str,
    found: tuple[int, tuple[int, ...]],
) -> str:
    return (
        f"{tensor!r} is cut along dim {expected[0]} with {expected[1]} across, but {param!r} has "
        f"it along dim {found[0]} with {found[1]} across"
    )


def _wants(held: Mapping[str, _Held], targets: Layouts) -> tuple[list[_Want], tuple[Padding, ...]]:
    """Every destination row once, cut where its holders change."""
    wants: list[_Want] = []
    paddings: list[Padding] = []
    problems: list[str] = []
    for rank in sorted(targets):
        for name, layout in targets[rank].items():
            dim, row_elements = layout.dim, layout.row_elements
            mine = (dim, layout.cross_shape)
            for at, interval in layout.located():
                start, length, tensor = interval.start, interval.length, interval.tensor
                if tensor is None:
                    paddings.append(
                        Padding(rank=rank, param=name, start=at, length=length, dim=dim)
                    )
                    continue
                owner = held.get(tensor)
                if owner is not None and (owner.dim, owner.cross_shape) != mine:
                    known = (owner.dim, owner.cross_shape)
                    problems.append(_differs(tensor, known, name, mine))
                    continue
                for low, high, holders in _segments(owner, start, interval.stop):
                    if not holders:
                        problems.append(
                            f"rank {rank}: {name!r} needs rows {low}:{high} of {tensor!r}, "
                            "which no source holds"
                        )
                    row = at + low - start
                    wants.append(
                        _Want(rank, name, row, low, high - low, dim, row_elements, holders)
                    )
    if problems:
        raise WeightError("\n".join(problems))
    return wants, tuple(paddings)


def _segments(
    held: _Held | None, start: int, stop: int
) -> list[tuple[int, int, Sequence[_Holder]]]:
    """Rows start:stop cut at the bounds of `held`; a segment that nobody holds has no holders."""
    if held is None:
        return [(start, stop, ())]
    segments: list[tuple[int, int, Sequence[_Holder]]] = []
    row = start
    while row < stop:
        at = bisect_right(held.bounds, row) - 1
        inside = 0 <= at < len(held.holders)
        edge = held.bounds[at + 1] if at + 1 < len(held.bounds) else stop
        segments.append((row, min(stop, edge), held.holders[at] if inside else ()))
        row = min(stop, edge)
    return segments


def _chosen(wants: Sequence[_Want]) -> list[_Holder]:
    """One holder for each want: forced choices first, then the largest, so that loads even out."""
    load: Counter[int] = Counter()
    chosen: dict[int, _Holder] = {}
    free = []
    for index, want in enumerate(wants):
        own = next((holder for holder in want.holders if holder.rank == want.rank), None)
        if own is not None:
            chosen[index] = own
        elif len(want.holders) == 1:
            chosen[index] = want.holders[0]
            load[want.holders[0].rank] += want.length * want.row_elements
        else:
            free.append(index)
    free.sort(key=lambda index: (-wants[index].length * wants[index].row_elements, index))
    for index in free:
        want = wants[index]
        holder = min(want.holders, key=lambda h: (load[h.rank], h.rank, h.param))
        chosen[index] = holder
        load[holder.rank] += want.length * want.row_elements
    return [chosen[index] for index in range(len(wants))]


def _coalesced(wants: Sequence[_Want], holders: Sequence[_Holder]) -> tuple[Copy, ...]:
    """One copy for each run of wants that is contiguous on both sides."""
    copies: list[Copy] = []
    run: list[tuple[_Want, _Holder]] = []

    def close() -> None:
        want, holder = run[0]
        copies.append(
            Copy(
                src_rank=holder.rank,
                src_param=holder.param,
                src_start=want.row + holder.shift,
                dst_rank=want.rank,
                dst_param=want.param,
                dst_start=want.start,
                length=sum(member.length for member, _ in run),
                dim=want.dim,
                row_elements=want.row_elements,
            )
        )
        run.clear()

    for want, holder in zip(wants, holders, strict=True):
        if run and not _continues(*run[-1], want, holder):
            close()
        run.append((want, holder))
    if run:
        close()
    return tuple(copies)


def _continues(last: _Want, last_holder: _Holder, want: _Want, holder: _Holder) -> bool:
    return (
        (want.rank, want.param, want.start) == (last.rank, last.param, last.start + last.length)
        and (holder.rank, holder.param) == (last_holder.rank, last_holder.param)
        and want.row + holder.shift == last.row + last_holder.shift + last.length
    )


def _check_covered(targets: Layouts, copies: Sequence[Copy], paddings: Sequence[Padding]) -> None:
    """Hold the finished plan against the targets: every row is written exactly once."""
    written: dict[tuple[int, str], list[tuple[int, int]]] = defaultdict(list)
    for copy in copies:
        written[copy.dst_rank, copy.dst_param].append((copy.dst_start, copy.length))
    for padding in paddings:
        written[padding.rank, padding.param].append((padding.start, padding.length))
    for rank, layouts in targets.items():
        for name, layout in layouts.items():
            at = 0
            for start, length in sorted(written[rank, name]):
                assert start == at, f"plan writes row {min(start, at)} of {name} on {rank} wrongly"
                at += length
            assert at == layout.shape[layout.dim], f"plan leaves rows {at}: of {name} on {rank}"


def _shapes(side: Layouts) -> dict[int, Shapes]:
    return {
        rank: {name: layout.shape for name, layout in side[rank].items()} for rank in sorted(side)
    }


def _digest(
    records: Sequence[Copy | Padding | Alias],
    source_shapes: Mapping[int, Shapes],
    target_shapes: Mapping[int, Shapes],
) -> str:
    state = hashlib.sha256()
    for record in records:
        state.update(repr(record).encode())
    for shapes in (source_shapes, target_shapes):
        state.update(repr({rank: dict(of_rank) for rank, of_rank in shapes.items()}).encode())
    return state.hexdigest()

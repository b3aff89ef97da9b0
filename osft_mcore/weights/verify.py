"""Proof of a transfer: digests of every copy, computed at its source and at its target."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from osft_mcore.errors import WeightError
from osft_mcore.weights.plan import Copy, Padding, ReshardPlan
from osft_mcore.weights.schedule import RankSchedule
from osft_mcore.weights.transport import lost_ranks

Verify = Literal["off", "sample", "full"]

SAMPLED_ROWS, SAMPLED_COLUMNS = 32, 16
"""A sample of a copy has about this many rows, and this many elements of each."""
BATCH_ELEMENTS = 2**16
"""Elements that are looked at in one go: their numbers take eight bytes each, several times."""
MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64
"""2**64 over the golden ratio, as a signed number: spreads consecutive positions."""
STRIDE = 2654435761
"""A prime near 2**32 over the golden ratio."""
NUM_SHOWN = 4

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Which elements of a copy are looked at: every `step`-th from `first`, by row and across."""

    first_row: int
    row_step: int
    first_column: int
    column_step: int


EVERYTHING: Final = Grid(first_row=0, row_step=1, first_column=0, column_step=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What one rank looks at after a transfer; a pure value."""

    rank: int
    records: tuple[Copy | Padding, ...]
    """Of all ranks, in an order that all share."""
    mine: tuple[int, ...]
    """Records that this rank is the source or the target of."""
    piece_elements: int
    """A sample looks at every run of a copy that is this long."""


def make_audit(plan: ReshardPlan, schedule: RankSchedule) -> Audit:
    """The records of the plan that have this rank's schedule at one end."""
    records: tuple[Copy | Padding, ...] = (*plan.copies, *plan.paddings)
    return Audit(
        rank=schedule.rank,
        records=records,
        mine=tuple(at for at, record in enumerate(records) if schedule.rank in _ends(record)),
        piece_elements=schedule.piece_elements,
    )


@torch.no_grad()
def check_delivered(
    audit: Audit,
    source_params: Mapping[str, Tensor],
    target_params: Mapping[str, Tensor],
    *,
    verify: Verify,
    turn: int,
    group: ProcessGroup | None,
    device: torch.device,
) -> None:
    """Raise WeightError on every rank, naming rows and ranks, if a target is not its source.

    Collective over `group`. A sample takes other elements in every `turn`; padding must be zero.
    """
    if verify == "off":
        return
    differences = torch.zeros(len(audit.records), dtype=torch.int64, device=device)
    looked_at = _looked_at(audit, source_params, target_params, verify, turn)
    for batch in _batches(looked_at):
        where = torch.tensor([part.record for part in batch], device=device)
        signs = torch.tensor([part.sign for part in batch], device=device)
        numbers = digests([(part.place, part.table) for part in batch])
        differences.index_add_(0, where, signs * numbers)
    if group is not None:
        # The two digests of a copy may come from two ranks; equal ones add up to zero.
        with lost_ranks("comparing digests"):
            dist.all_reduce(differences, group=group)
    wrong = differences.nonzero().flatten().tolist()
    if wrong:
        raise WeightError(_message([audit.records[at] for at in wrong]))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Some of the elements that are looked at in one record."""

    record: int
    sign: int
    """Sources add to the record's number, targets take away; padding must not add anything."""
    place: int
    """Of the first element, among those of its record."""
    table: Tensor


def digests(parts: Sequence[tuple[int, Tensor]]) -> Tensor:
    """For each (place of its first element, table) a number that depends on every bit and place.

    The sum over elements of their bits times an odd number made from the place, modulo 2**64.
    Parts of one table add up. Returns int64 [parts], on the tables' device.
    """
    sizes = torch.tensor([table.numel() for _, table in parts])
    firsts = torch.tensor([place for place, _ in parts])
    elements = torch.cat([table.flatten() for _, table in parts])
    device = elements.device
    part = torch.repeat_interleave(torch.arange(len(parts)), sizes).to(device)
    shifts = (firsts - (sizes.cumsum(0) - sizes)).to(device)
    odd = (torch.arange(elements.numel(), device=device) + shifts[part]) * MULTIPLIER | 1
    bits = elements.view(_INTEGERS[elements.element_size()]).to(torch.int64)
    numbers = torch.zeros(len(parts), dtype=torch.int64, device=device)
    return numbers.index_add_(0, part, bits * odd)


def _looked_at(
    audit: Audit,
    source_params: Mapping[str, Tensor],
    target_params: Mapping[str, Tensor],
    verify: Verify,
    turn: int,
) -> Iterator[_Part]:
    for at in audit.mine:
        record = audit.records[at]
        if isinstance(record, Padding):
            param, rows = target_params[record.param], (record.start, record.length)
            yield from _parts(at, 1, _table(param, record.dim, *rows, EVERYTHING))
            continue
        grid = grid_of(record, verify, turn, audit.piece_elements)
        if record.src_rank == audit.rank:
            param, rows = source_params[record.src_param], (record.src_start, record.length)
            yield from _parts(at, 1, _table(param, record.dim, *rows, grid))
        if record.dst_rank == audit.rank:
            param, rows = target_params[record.dst_param], (record.dst_start, record.length)
            yield from _parts(at, -1, _table(param, record.dim, *rows, grid))


def _table(param: Tensor, dim: int, start: int, length: int, grid: Grid) -> Tensor:
    """The elements of these rows that are on the grid, rows first; a view.

    One call instead of three slices and a transpose: a push looks at thousands of copies.
    """
    across, stride = (1, 1) if param.dim() == 1 else (param.shape[1 - dim], param.stride(1 - dim))
    return param.as_strided(
        (
            -(-(length - grid.first_row) // grid.row_step),
            -(-(across - grid.first_column) // grid.column_step),
        ),
        (param.stride(dim) * grid.row_step, stride * grid.column_step),
        param.storage_offset()
        + (start + grid.first_row) * param.stride(dim)
        + grid.first_column * stride,
    )


def _parts(record: int, sign: int, table: Tensor) -> Iterator[_Part]:
    """The table in parts of at most a batch (or one row)."""
    step = max(1, BATCH_ELEMENTS // table.shape[1])
    for start in range(0, table.shape[0], step):
        part = table if step >= table.shape[0] else table[start : start + step]
        yield _Part(record=record, sign=sign, place=start * table.shape[1], table=part)


def _batches(parts: Iterator[_Part]) -> Iterator[list[_Part]]:
    batch: list[_Part] = []
    size = 0
    for part in parts:
        if batch and size + part.table.numel() > BATCH_ELEMENTS:
            yield batch
            batch, size = [], 0
        batch.append(part)
        size += part.table.numel()
    if batch:
        yield batch


def _ends(record: Copy | Padding) -> tuple[int, ...]:
    return (record.rank,) if isinstance(record, Padding) else (record.src_rank, record.dst_rank)


def grid_of(copy: Copy, verify: Verify, turn: int, piece_elements: int) -> Grid:
    """What is looked at in push number `turn`; samples differ until they have seen everything."""
    if verify == "full":
        return EVERYTHING
    piece_rows = max(1, piece_elements // copy.row_elements)
    row_step = max(1, min(copy.length // SAMPLED_ROWS, piece_rows))
    column_step = max(1, copy.row_elements // SAMPLED_COLUMNS)
    # A walk over all pairs of offsets: a prime step leaves none out and lets none come back early.
    first_column, first_row = divmod(turn * STRIDE % (row_step * column_step), row_step)
    return Grid(
        first_row=first_row,
        row_step=row_step,
        first_column=first_column,
        column_step=column_step,
    )


def _message(wrong: list[Copy | Padding]) -> str:
    lines = [_line(record) for record in wrong[:NUM_SHOWN]]
    if len(wrong) > NUM_SHOWN:
        lines.append(f"and {len(wrong) - NUM_SHOWN} more such parts")
    return "\n".join(lines)


def _line(record: Copy | Padding) -> str:
    if isinstance(record, Padding):
        stop = record.start + record.length
        return (
            f"rank {record.rank}: padding rows {record.start}:{stop} of {record.param!r} are not "
            "zero after the push"
        )
    start, stop = record.dst_start, record.dst_start + record.length
    return (
        f"rank {record.dst_rank}: rows {start}:{stop} of {record.dst_param!r} are not what rank "
        f"{record.src_rank} holds as {record.src_param!r}: the push was corrupted on the way"
    )

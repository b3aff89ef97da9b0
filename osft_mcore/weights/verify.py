"""Proof of a transfer: digests of every copy, computed at its source and at its target."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from osft_mcore.errors import WeightError
from osft_mcore.weights.plan import Copy, Padding, ReshardPlan
from osft_mcore.weights.schedule import RankSchedule
from osft_mcore.weights.transport import lost_ranks

Verify = Literal["off", "sample", "full"]

SAMPLES_PER_DIM = 64
"""A sample of a copy has about this many rows, and this many elements of each."""
CHUNK_ELEMENTS = 2**20
"""A full digest reads this many at a time: its numbers take eight bytes each."""
MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64
"""2**64 over the golden ratio, as a signed number: spreads consecutive positions."""
NUM_SHOWN = 4

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Which elements of a copy are looked at: every `step`-th from `first`, by row and across."""

    first_row: int
    row_step: int
    first_column: int
    column_step: int


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
    for at in audit.mine:
        record = audit.records[at]
        if isinstance(record, Padding):
            rows = target_params[record.param].narrow(record.dim, record.start, record.length)
            differences[at] += rows.count_nonzero()
            continue
        grid = _grid(record, verify, turn, audit.piece_elements)
        if record.src_rank == audit.rank:
            source = source_params[record.src_param]
            rows = source.narrow(record.dim, record.src_start, record.length)
            differences[at] += digest(rows, record.dim, grid)
        if record.dst_rank == audit.rank:
            target = target_params[record.dst_param]
            rows = target.narrow(record.dim, record.dst_start, record.length)
            differences[at] -= digest(rows, record.dim, grid)
    if group is not None:
        # The two digests of a copy may come from two ranks; equal ones add up to zero.
        with lost_ranks("comparing digests"):
            dist.all_reduce(differences, group=group)
    wrong = differences.nonzero().flatten().tolist()
    if wrong:
        raise WeightError(_message([audit.records[at] for at in wrong]))


def digest(rows: Tensor, dim: int, grid: Grid) -> Tensor:
    """A number (int64, on the tensor's device) that depends on every bit, and place, looked at.

    The sum over elements of bits times an odd number made from the place, modulo 2**64.
    """
    table = rows.unsqueeze(1) if rows.dim() == 1 else rows.movedim(dim, 0).flatten(1)
    table = table[grid.first_row :: grid.row_step, grid.first_column :: grid.column_step]
    total = torch.zeros((), dtype=torch.int64, device=rows.device)
    step = max(1, CHUNK_ELEMENTS // max(1, table.shape[1]))
    for start in range(0, table.shape[0], step):
        part = table[start : start + step].contiguous()
        bits = part.view(_INTEGERS[part.element_size()]).flatten().to(torch.int64)
        first = start * table.shape[1]
        place = torch.arange(first, first + bits.numel(), device=rows.device)
        total += (bits * (place.mul_(MULTIPLIER).bitwise_or_(1))).sum()
    return total


def _ends(record: Copy | Padding) -> tuple[int, ...]:
    return (record.rank,) if isinstance(record, Padding) else (record.src_rank, record.dst_rank)


def _grid(copy: Copy, verify: Verify, turn: int, piece_elements: int) -> Grid:
    if verify == "full":
        return Grid(first_row=0, row_step=1, first_column=0, column_step=1)
    piece_rows = max(1, piece_elements // copy.row_elements)
    row_step = max(1, min(copy.length // SAMPLES_PER_DIM, piece_rows))
    column_step = max(1, copy.row_elements // SAMPLES_PER_DIM)
    return Grid(
        first_row=turn % row_step,
        row_step=row_step,
        first_column=turn % column_step,
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

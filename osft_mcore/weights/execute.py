"""Carry out one rank's schedule on real parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from osft_mcore.weights.plan import Copy, Padding, Shapes
from osft_mcore.weights.schedule import Message, Piece, RankSchedule, Round
from osft_mcore.weights.transport import Parcel, agree, exchange


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferReport:
    """What one rank moved."""

    bytes_sent: int
    bytes_received: int
    bytes_local: int
    num_messages: int
    """Sent and received."""
    num_buckets: int
    """Rounds in which this rank took part."""
    peak_extra_bytes: int


@torch.no_grad()
def execute(
    schedule: RankSchedule,
    source_params: Mapping[str, Tensor],
    target_params: Mapping[str, Tensor],
    *,
    group: ProcessGroup | None,
) -> TransferReport:
    """Fill `target_params` as planned. Collective over `group` (None: nothing is remote).

    Ranks of the plan are global ranks. Messages travel in the sources' dtype; a target of another
    dtype is cast on arrival. Extra memory is one bucket of schedule.bucket_elements.
    Raises WeightError on every rank, before anything is written, if on any rank a parameter is
    missing, unknown, or of another shape or dtype than planned.
    """
    device = _device(source_params, target_params)
    problems = shape_mismatches("source", schedule.source_shapes, source_params)
    problems += shape_mismatches("target", schedule.target_shapes, target_params)
    problems += [
        f"source parameter {name!r} is {param.dtype}, planned as {schedule.dtype}"
        for name, param in source_params.items()
        if param.dtype != schedule.dtype
    ]
    if group is None and schedule.rounds:
        problems.append(f"rank {schedule.rank} has remote copies but was given no process group")
    agree([f"rank {schedule.rank}: {problem}" for problem in problems], group, device)

    for padding in schedule.paddings:
        zero_rows(target_params[padding.param], padding)
    for copy in schedule.local:
        copy_rows(target_params[copy.dst_param], copy, source_params[copy.src_param])
    bucket = torch.empty(schedule.bucket_elements, dtype=schedule.dtype, device=device)
    if group is not None:
        for turn in schedule.rounds:
            _run_round(turn, bucket, source_params, target_params, group)
    return _report(schedule)


def copy_rows(target: Tensor, copy: Copy, source: Tensor) -> None:
    """Write the copied rows of `source` into `target`, casting if needed."""
    rows = source.narrow(copy.dim, copy.src_start, copy.length)
    target.narrow(copy.dim, copy.dst_start, copy.length).copy_(rows)


def zero_rows(target: Tensor, padding: Padding) -> None:
    """Zero the padding rows of `target`."""
    target.narrow(padding.dim, padding.start, padding.length).zero_()


def shape_mismatches(side: str, expected: Shapes, params: Mapping[str, Tensor]) -> list[str]:
    """Everything that is missing, unknown or of another shape than `expected`, in words."""
    problems = [f"{side} parameter {name!r} is missing" for name in expected if name not in params]
    for name, param in params.items():
        if name not in expected:
            problems.append(f"{side} parameter {name!r} has no layout: it would be left as it is")
        elif tuple(param.shape) != expected[name]:
            problems.append(
                f"{side} parameter {name!r} has shape {tuple(param.shape)}, its layout says "
                f"{expected[name]}"
            )
    return problems


def _run_round(
    turn: Round,
    bucket: Tensor,
    source_params: Mapping[str, Tensor],
    target_params: Mapping[str, Tensor],
    group: ProcessGroup,
) -> None:
    messages = (*turn.sends, *turn.receives)
    starts = accumulate((message.num_elements for message in messages), initial=0)
    buffers = [bucket[at : at + m.num_elements] for at, m in zip(starts, messages, strict=False)]
    parcels = [Parcel(peer=m.peer, buffer=b) for m, b in zip(messages, buffers, strict=True)]
    num_sends = len(turn.sends)
    for message, buffer in zip(turn.sends, buffers, strict=False):
        for piece in message.pieces:
            rows, packed = _views(source_params[piece.param], buffer, piece)
            packed.copy_(rows)
    exchange(parcels[:num_sends], parcels[num_sends:], group)
    for message, buffer in zip(turn.receives, buffers[num_sends:], strict=True):
        for piece in message.pieces:
            rows, packed = _views(target_params[piece.param], buffer, piece)
            rows.copy_(packed)


def _views(param: Tensor, buffer: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    """The piece's rows in the parameter and in the message, in one shape."""
    rows = param.narrow(piece.dim, piece.start, piece.length)
    return rows, buffer[piece.offset : piece.offset + piece.num_elements].view(rows.shape)


def _device(*sides: Mapping[str, Tensor]) -> torch.device:
    for side in sides:
        for param in side.values():
            return param.device
    return torch.device("cpu")


def _report(schedule: RankSchedule) -> TransferReport:
    def total(messages: tuple[Message, ...]) -> int:
        return sum(message.num_elements for message in messages) * schedule.dtype.itemsize

    return TransferReport(
        bytes_sent=sum(total(turn.sends) for turn in schedule.rounds),
        bytes_received=sum(total(turn.receives) for turn in schedule.rounds),
        bytes_local=sum(copy.num_elements for copy in schedule.local) * schedule.dtype.itemsize,
        num_messages=sum(len(turn.sends) + len(turn.receives) for turn in schedule.rounds),
        num_buckets=len(schedule.rounds),
        peak_extra_bytes=schedule.bucket_elements * schedule.dtype.itemsize,
    )

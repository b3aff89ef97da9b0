"""Carry out one rank's schedule on real parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from osft_mcore.weights.phases import Phases
from osft_mcore.weights.plan import Copy, Padding, Shapes
from osft_mcore.weights.schedule import NUM_BUFFERS, Message, Piece, RankSchedule, Round
from osft_mcore.weights.transport import InFlight, Parcel, agree, post


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferReport:
    """What one rank moved, and how long it took."""

    bytes_sent: int
    bytes_received: int
    bytes_local: int
    num_messages: int
    """Sent and received."""
    num_rounds: int
    """In which this rank took part."""
    peak_extra_bytes: int
    pack_s: float
    """Copying rows into buffers."""
    transfer_s: float
    """Sending and waiting; what is packed and written meanwhile hides a part of it."""
    write_s: float
    """Copying rows into the targets, from buffers and from this rank's own sources."""
    verify_s: float = 0.0
    """Comparing digests; left to the caller of `execute`."""

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return self.pack_s + self.transfer_s + self.write_s + self.verify_s


@torch.no_grad()
def execute(
    schedule: RankSchedule,
    source_params: Mapping[str, Tensor],
    target_params: Mapping[str, Tensor],
    *,
    group: ProcessGroup | None,
    problems: Sequence[str] = (),
) -> TransferReport:
    """Fill `target_params` as planned. Collective over `group` (None: nothing is remote).

    Ranks of the plan are global ranks. Messages travel in the sources' dtype; a target of another
    dtype is cast on arrival. Aliases are left alone. Extra memory is at most
    schedule.buffer_bytes: rows that lie in one run travel without a buffer.
    Raises WeightError on every rank, before anything is written, if on any rank a parameter is
    missing, unknown, or of another shape or dtype than planned, or the caller brings `problems`;
    and if another rank is lost.
    """
    device = _device(source_params, target_params)
    problems = [*problems, *shape_mismatches("source", schedule.source_shapes, source_params)]
    problems += shape_mismatches("target", schedule.target_shapes, target_params)
    problems += [
        f"source parameter {name!r} is {param.dtype}, planned as {schedule.dtype}"
        for name, param in source_params.items()
        if param.dtype != schedule.dtype
    ]
    if group is None and schedule.rounds:
        problems.append("it has remote copies but was given no process group")
    agree([f"rank {schedule.rank}: {problem}" for problem in problems], group, device)

    buffers = _buffers(schedule, source_params, target_params, device)
    phases = Phases(device)
    under_way: InFlight | None = None
    for index, turn in enumerate(schedule.rounds):
        assert group is not None, "remote copies without a group were refused above"
        with phases("pack"):
            buffer = buffers[index % NUM_BUFFERS]
            sends, receives = _pack(turn, buffer, source_params, target_params)
        with phases("transfer"):
            posted = post(sends, receives, group)
        if under_way is None:
            _write_local(schedule, source_params, target_params, phases)
        else:
            _arrive(schedule.rounds[index - 1], under_way, target_params, phases)
        under_way = posted
    if under_way is None:
        _write_local(schedule, source_params, target_params, phases)
    else:
        _arrive(schedule.rounds[-1], under_way, target_params, phases)
    peak = sum(buffer.numel() * buffer.element_size() for buffer in buffers)
    return _report(schedule, phases, peak)


def combined(reports: Sequence[TransferReport]) -> TransferReport:
    """Transfers one after the other as one."""
    return TransferReport(
        bytes_sent=sum(report.bytes_sent for report in reports),
        bytes_received=sum(report.bytes_received for report in reports),
        bytes_local=sum(report.bytes_local for report in reports),
        num_messages=sum(report.num_messages for report in reports),
        num_rounds=sum(report.num_rounds for report in reports),
        peak_extra_bytes=max((report.peak_extra_bytes for report in reports), default=0),
        pack_s=sum(report.pack_s for report in reports),
        transfer_s=sum(report.transfer_s for report in reports),
        write_s=sum(report.write_s for report in reports),
        verify_s=sum(report.verify_s for report in reports),
    )


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


def _write_local(
    schedule: RankSchedule,
    source_params: Mapping[str, Tensor],
    target_params: Mapping[str, Tensor],
    phases: Phases,
) -> None:
    with phases("write"):
        for padding in schedule.paddings:
            zero_rows(target_params[padding.param], padding)
        for copy in schedule.local:
            copy_rows(target_params[copy.dst_param], copy, source_params[copy.src_param])


def _buffers(
    schedule: RankSchedule,
    source_params: Mapping[str, Tensor],
    target_params: Mapping[str, Tensor],
    device: torch.device,
) -> list[Tensor]:
    """As large as the largest round needs: most rows travel from and to where they lie."""
    staged = [
        sum(
            message.num_elements
            for messages, params in ((turn.sends, source_params), (turn.receives, target_params))
            for message in messages
            if _in_place(message, params, schedule.dtype) is None
        )
        for turn in schedule.rounds
    ]
    return [
        torch.empty(max(staged), dtype=schedule.dtype, device=device)
        for _ in range(schedule.num_buffers)
    ]


def _in_place(message: Message, params: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor | None:
    """The message's rows where they lie in the parameter, if they can travel from or to there."""
    first, *others = message.pieces
    rows = params[first.param].narrow(first.dim, first.start, first.length)
    if others or rows.dtype != dtype or not rows.is_contiguous():
        return None
    return rows.view(-1)


def _pack(
    turn: Round,
    buffer: Tensor,
    source_params: Mapping[str, Tensor],
    target_params: Mapping[str, Tensor],
) -> tuple[list[Parcel], list[Parcel]]:
    """The round's parcels, to send and to receive; those that need it in the buffer."""
    taken = 0

    def parcel(message: Message, params: Mapping[str, Tensor]) -> Parcel:
        nonlocal taken
        run = _in_place(message, params, buffer.dtype)
        staged = run is None
        if run is None:
            run = buffer[taken : taken + message.num_elements]
            taken += message.num_elements
        return Parcel(peer=message.peer, buffer=run, staged=staged, content=_content(message))

    sends = [parcel(message, source_params) for message in turn.sends]
    receives = [parcel(message, target_params) for message in turn.receives]
    for message, packed in zip(turn.sends, sends, strict=True):
        for piece in message.pieces if packed.staged else ():
            rows, part = _views(source_params[piece.param], packed.buffer, piece)
            part.copy_(rows)
    return sends, receives


def _arrive(
    turn: Round, under_way: InFlight, target_params: Mapping[str, Tensor], phases: Phases
) -> None:
    with phases("transfer"):
        under_way.wait()
    with phases("write"):
        for message, packed in zip(turn.receives, under_way.receives, strict=True):
            for piece in message.pieces if packed.staged else ():
                rows, part = _views(target_params[piece.param], packed.buffer, piece)
                rows.copy_(part)


def _content(message: Message) -> str:
    first, *others = message.pieces
    return f"{first.param!r}" + (f" and {len(others)} more" if others else "")


def _views(param: Tensor, buffer: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    """The piece's rows in the parameter and in the message, in one shape."""
    rows = param.narrow(piece.dim, piece.start, piece.length)
    return rows, buffer[piece.offset : piece.offset + piece.num_elements].view(rows.shape)


def _device(*sides: Mapping[str, Tensor]) -> torch.device:
    for side in sides:
        for param in side.values():
            return param.device
    return torch.device("cpu")


def _report(schedule: RankSchedule, phases: Phases, peak_extra_bytes: int) -> TransferReport:
    def total(messages: tuple[Message, ...]) -> int:
        return sum(message.num_elements for message in messages) * schedule.dtype.itemsize

    return TransferReport(
        bytes_sent=sum(total(turn.sends) for turn in schedule.rounds),
        bytes_received=sum(total(turn.receives) for turn in schedule.rounds),
        bytes_local=sum(copy.num_elements for copy in schedule.local) * schedule.dtype.itemsize,
        num_messages=sum(len(turn.sends) + len(turn.receives) for turn in schedule.rounds),
        num_rounds=len(schedule.rounds),
        peak_extra_bytes=peak_extra_bytes,
        pack_s=phases.seconds("pack"),
        transfer_s=phases.seconds("transfer"),
        write_s=phases.seconds("write"),
    )

"""One rank's part of a plan, as rounds of messages under a byte cap; computed once, no data."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from osft_mcore.errors import WeightError
from osft_mcore.weights.plan import Copy, Padding, ReshardPlan, Shapes

NUM_BUFFERS = 2
"""One round is packed, or unpacked, while another is under way."""
SOLO_BYTES = 2**17
"""A piece of this size is a message of its own: if its rows lie in one run, it needs no buffer."""
PIECES_PER_BUCKET = 4
"""A copy is split to at most this share of a round, so that peers are served side by side."""


_Part = tuple[Copy, int, int]
"""A remote copy, its first row that moves, and how many rows move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows of one parameter inside a message, at `offset` elements."""

    param: str
    dim: int
    start: int
    length: int
    offset: int
    num_elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One flat run of elements from one rank to another."""

    peer: int
    num_elements: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Messages in flight together; together at most a buffer. Both ends list them alike."""

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSchedule:
    """All that one rank does in a transfer, in order.

    Rounds are numbered over all ranks and each message is in the same round on both ends, so a
    rank in the lowest unfinished round only waits for ranks in that same round: no deadlock. A
    rank sets out on its next round before it waits for the last one, never further ahead.
    """

    rank: int
    dtype: torch.dtype
    """Of every source parameter, and of every message."""
    local: tuple[Copy, ...]
    paddings: tuple[Padding, ...]
    rounds: tuple[Round, ...]
    buffer_elements: int
    """Largest round of this rank."""
    piece_elements: int
    """No piece is larger, unless it is a single row."""
    source_shapes: Shapes
    target_shapes: Shapes

    @property
    def num_buffers(self) -> int:
        """Buffers that a transfer needs."""
        return min(NUM_BUFFERS, len(self.rounds))

    @property
    def buffer_bytes(self) -> int:
        """The most extra memory that a transfer takes."""
        return self.num_buffers * self.buffer_elements * self.dtype.itemsize


def make_schedule(
    plan: ReshardPlan, rank: int, *, dtype: torch.dtype, bucket_bytes: int
) -> RankSchedule:
    """Cut the plan into rounds; the buffers of a rank never take more than `bucket_bytes` in all.

    Every rank must pass the same plan, dtype and bucket size. Raises WeightError if one row of
    one parameter is larger than the bucket.
    """
    cap = bucket_bytes // NUM_BUFFERS // dtype.itemsize
    rounds = _assign_rounds(_split(plan.copies, cap), cap)
    solo = SOLO_BYTES // dtype.itemsize
    mine = [_round(copies, rank, solo) for copies in rounds]
    busy = tuple(r for r in mine if r.sends or r.receives)
    return RankSchedule(
        rank=rank,
        dtype=dtype,
        local=tuple(c for c in plan.copies if c.src_rank == c.dst_rank == rank),
        paddings=tuple(p for p in plan.paddings if p.rank == rank),
        rounds=busy,
        buffer_elements=max(
            (sum(m.num_elements for m in (*r.sends, *r.receives)) for r in busy), default=0
        ),
        piece_elements=cap // PIECES_PER_BUCKET,
        source_shapes=plan.source_shapes.get(rank, {}),
        target_shapes=plan.target_shapes.get(rank, {}),
    )


def _split(copies: Sequence[Copy], cap: int) -> list[_Part]:
    """Remote copies as (copy, first row, rows) within the cap, serving all pairs in turn."""
    queues: dict[tuple[int, int], list[_Part]] = defaultdict(list)
    for copy in copies:
        if copy.src_rank == copy.dst_rank:
            continue
        if copy.row_elements > cap:
            raise WeightError(
                f"one row of {copy.src_param!r} has {copy.row_elements} elements, more than the "
                f"{cap} that fit into half a bucket; raise sync.bucket_mib"
            )
        step = max(1, cap // PIECES_PER_BUCKET // copy.row_elements)
        queue = queues[copy.src_rank, copy.dst_rank]
        for first in range(0, copy.length, step):
            queue.append((copy, first, min(step, copy.length - first)))
    num_ranks = 1 + max((rank for pair in queues for rank in pair), default=0)
    turns = [
        (turn, (dst - src) % num_ranks, src, piece)
        for (src, dst), queue in queues.items()
        for turn, piece in enumerate(queue)
    ]
    turns.sort(key=lambda entry: entry[:3])
    return [piece for *_, piece in turns]


def _assign_rounds(pieces: Sequence[_Part], cap: int) -> list[list[_Part]]:
    """Put each piece into the first round where both of its ranks have room."""
    rounds: list[list[_Part]] = []
    room: list[dict[int, int]] = []
    first_open: dict[int, int] = defaultdict(int)
    for piece in pieces:
        copy, _, length = piece
        size = length * copy.row_elements
        ranks = (copy.src_rank, copy.dst_rank)
        at = max(first_open[rank] for rank in ranks)
        while at < len(rounds) and any(room[at].get(rank, cap) < size for rank in ranks):
            at += 1
        if at == len(rounds):
            rounds.append([])
            room.append({})
        rounds[at].append(piece)
        for rank in ranks:
            room[at][rank] = room[at].get(rank, cap) - size
            # A nearly full round is not looked at again: keeps the search linear.
            while (
                first_open[rank] < len(rounds)
                and room[first_open[rank]].get(rank, cap) < cap // PIECES_PER_BUCKET
            ):
                first_open[rank] += 1
    return rounds


def _round(parts: Sequence[_Part], rank: int, solo: int) -> Round:
    """The messages of one rank in one round, by peer; both ends list pieces in the same order."""
    sends: dict[int, list[_Part]] = defaultdict(list)
    receives: dict[int, list[_Part]] = defaultdict(list)
    for part in parts:
        if part[0].src_rank == rank:
            sends[part[0].dst_rank].append(part)
        elif part[0].dst_rank == rank:
            receives[part[0].src_rank].append(part)
    return Round(
        sends=_messages(sends, solo, sending=True),
        receives=_messages(receives, solo, sending=False),
    )


def _messages(
    by_peer: Mapping[int, Sequence[_Part]], solo: int, *, sending: bool
) -> tuple[Message, ...]:
    """Per peer the small pieces in one message, then each of `solo` elements or more in its own."""
    messages = []
    for peer in sorted(by_peer):
        small = [part for part in by_peer[peer] if _num_elements(part) < solo]
        large = [[part] for part in by_peer[peer] if _num_elements(part) >= solo]
        messages += [_message(peer, parts, sending) for parts in (small, *large) if parts]
    return tuple(messages)


def _message(peer: int, parts: Sequence[_Part], sending: bool) -> Message:
    sizes = [_num_elements(part) for part in parts]
    pieces = tuple(
        Piece(
            param=copy.src_param if sending else copy.dst_param,
            dim=copy.dim,
            start=first + (copy.src_start if sending else copy.dst_start),
            length=length,
            offset=offset,
            num_elements=size,
        )
        for (copy, first, length), size, offset in zip(
            parts, sizes, accumulate(sizes, initial=0), strict=False
        )
    )
    return Message(peer=peer, num_elements=sum(sizes), pieces=pieces)


def _num_elements(part: _Part) -> int:
    copy, _, length = part
    return length * copy.row_elements

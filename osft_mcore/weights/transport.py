"""Flat buffers between ranks, and what ranks have to agree on; knows nothing of layouts."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from osft_mcore.errors import WeightError


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """A contiguous buffer to send to, or to fill from, a global rank."""

    peer: int
    buffer: Tensor
    staged: bool
    """False: the buffer is where the content comes from, or belongs."""
    content: str
    """For messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """Parcels under way; their buffers may not be touched before `wait` returns."""

    sends: Sequence[Parcel]
    receives: Sequence[Parcel]
    works: Sequence[dist.Work]

    def wait(self) -> None:
        """Return when all have arrived (on CUDA: when the stream may go on).

        Raises WeightError, naming peer and content, if one never will.
        """
        parcels = [("sending", "to", parcel) for parcel in self.sends]
        parcels += [("receiving", "from", parcel) for parcel in self.receives]
        for index, work in enumerate(self.works):
            # NCCL has one handle for the whole batch, gloo one for each parcel.
            mine = [parcels[index]] if len(self.works) == len(parcels) else parcels
            doing = ", ".join(f"{verb} {p.content} {to} rank {p.peer}" for verb, to, p in mine)
            with lost_ranks(doing):
                work.wait()


def post(sends: Sequence[Parcel], receives: Sequence[Parcel], group: ProcessGroup) -> InFlight:
    """Set all parcels on their way, point to point.

    Each send must meet a receive of the same size in the peer's call of the same turn.
    """
    operations = [dist.P2POp(dist.isend, parcel.buffer, parcel.peer, group) for parcel in sends]
    operations += [dist.P2POp(dist.irecv, parcel.buffer, parcel.peer, group) for parcel in receives]
    peers = sorted({parcel.peer for parcel in (*sends, *receives)})
    with lost_ranks(f"reaching ranks {peers}"):
        works = dist.batch_isend_irecv(operations) if operations else []
    return InFlight(sends=sends, receives=receives, works=works)


@contextlib.contextmanager
def lost_ranks(doing: str) -> Iterator[None]:
    """Enter around communication: its failure is a WeightError that says what was going on.

    A rank that died is noticed at once or at the group's timeout; the error is this rank's own,
    the others get theirs.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # gloo puts a source line before what happened, and general advice behind it.
        reason = re.sub(r"\[\S+:\d+\]", "", str(error).split(". This is")[0])
        reason = " ".join(reason.split())[-160:]
        raise WeightError(
            f"the push broke off while {doing}: a rank died, or did not answer within "
            f"deadlines.sync ({reason})"
        ) from error


def check_same(digest: str, group: ProcessGroup, device: torch.device) -> None:
    """Raise WeightError on every rank if a digest (hexadecimal) differs. Collective over group."""
    mine = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=device)
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    with lost_ranks("comparing plans"):
        dist.all_gather(theirs, mine, group=group)
    ranks = dist.get_process_group_ranks(group)
    odd = [rank for rank, other in zip(ranks, theirs, strict=True) if not other.equal(theirs[0])]
    if odd:
        raise WeightError(
            f"ranks {odd} computed another reshard plan than rank {ranks[0]}; all ranks must run "
            "the same configuration (parallel.*, rollout.tp, model.*, sync.*) and the same version "
            "of this package"
        )


def agree(problems: Sequence[str], group: ProcessGroup | None, device: torch.device) -> None:
    """Raise WeightError with all ranks' problems on every rank. Collective over group.

    Without this, the ranks that are fine would wait for messages that never come.
    """
    text = "\n".join(problems)
    if group is not None:
        with lost_ranks("comparing notes with all ranks"):
            text = "\n".join(part for part in _gather_text(text, group, device) if part)
    if text:
        raise WeightError(text)


def _gather_text(text: str, group: ProcessGroup, device: torch.device) -> list[str]:
    """Every rank's text, by rank; one small reduction if nobody has any."""
    mine = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    longest = torch.tensor([mine.numel()], device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
    if not longest.item():
        return []
    # Texts hold no NUL, so padding with it needs no lengths.
    padded = torch.zeros(int(longest.item()), dtype=torch.uint8, device=device)
    padded[: mine.numel()] = mine
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, padded, group=group)
    return [bytes(part.tolist()).decode().rstrip("\0") for part in parts]

"""Flat buffers between ranks; knows nothing of parameters."""

from collections.abc import Sequence
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


def exchange(sends: Sequence[Parcel], receives: Sequence[Parcel], group: ProcessGroup) -> None:
    """Move all parcels point to point and wait for them.

    Each send must meet a receive of the same size in the peer's call of the same turn.
    """
    operations = [dist.P2POp(dist.isend, parcel.buffer, parcel.peer, group) for parcel in sends]
    operations += [dist.P2POp(dist.irecv, parcel.buffer, parcel.peer, group) for parcel in receives]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


def check_same(digest: str, group: ProcessGroup, device: torch.device) -> None:
    """Raise WeightError on every rank if a digest (hexadecimal) differs. Collective over group."""
    mine = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=device)
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(theirs, mine, group=group)
    ranks = dist.get_process_group_ranks(group)
    odd = [rank for rank, other in zip(ranks, theirs, strict=True) if not other.equal(theirs[0])]
    if odd:
        raise WeightError(
            f"ranks {odd} computed another reshard plan than rank {ranks[0]}; all ranks must run "
            "the same configuration and the same version of this package"
        )


def agree(problems: Sequence[str], group: ProcessGroup | None, device: torch.device) -> None:
    """Raise WeightError with all ranks' problems on every rank. Collective over group.

    Without this, the ranks that are fine would wait for messages that never come.
    """
    text = "\n".join(problems)
    if group is not None:
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

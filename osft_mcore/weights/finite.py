"""Weights that hold NaN or infinity."""

from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import Tensor

NUM_NAMED: Final = 3
"""Broken weights mostly come all together; a few of them say it."""


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """True if no element is NaN or infinite. Reads once, without copies; waits once for a GPU."""
    return not _broken(list(tensors))


def non_finite(params: Mapping[str, Tensor], *, whose: str = "the actor's") -> list[str]:
    """What is wrong with the parameters that are not finite, in one line; empty if all are.

    The line says `whose` they are.
    """
    names = [list(params)[index] for index in _broken(list(params.values()))]
    if not names:
        return []
    named = ", ".join(map(repr, names[:NUM_NAMED]))
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return [f"{len(names)} of {whose} {len(params)} parameters hold NaN or infinity: {named}{more}"]


@torch.no_grad()
def _broken(tensors: list[Tensor]) -> list[int]:
    """Positions of the tensors that are not finite."""
    filled = [index for index, tensor in enumerate(tensors) if tensor.numel()]
    if not filled:
        return []
    # A NaN is both the smallest and the largest. isfinite() would need a tensor of its own.
    ends = [torch.stack(torch.aminmax(tensors[index])).double() for index in filled]
    finite = torch.stack(ends).isfinite().all(dim=1).tolist()
    return [index for index, fine in zip(filled, finite, strict=True) if not fine]

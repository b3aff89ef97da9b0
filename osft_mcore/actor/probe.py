"""How sure the model is of some answers: log-probability and entropy of their tokens.

Shape suffixes: T tokens of a micro-batch, N of all that this rank tells of, 2 the two figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from osft_mcore.loss.linear import TokenLoss
from osft_mcore.parallel.groups import ParallelContext
from osft_mcore.records import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Of one figure over tokens, in nats."""

    mean: float
    std: float
    """Of these tokens (divided by their number)."""
    max: float
    min: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Over the tokens of all answers together, each counted once; the same on every rank."""

    logprob: Spread
    entropy: Spread
    num_tokens: int


def filled_up(examples: Sequence[Example], multiple: int) -> list[Example]:
    """As many as the layout can cut: copies of the shortest, kept out of the figures."""
    shortest = min(examples, key=lambda example: example.num_tokens)
    filler = replace(shortest, trained=False)
    return [*examples, *[filler] * (-len(examples) % multiple)]


def probe_of(
    parts: Sequence[TokenLoss], counted: Sequence[Tensor], context: ParallelContext
) -> Probe:
    """The figures of all ranks' micro-batches. Collective over the world.

    `parts` are what the forward pass found, empty outside of the last pipeline stage; `counted`
    says by micro-batch which tokens [T] count.
    """
    values_2N = torch.empty((2, 0), dtype=torch.float64, device=context.device)
    # Ranks of a tensor-parallel group have the same figures: one tells them.
    if parts and context.coordinates.tp_rank == 0:
        both = (
            torch.stack([part.logprobs_train_T, part.entropy_T])[:, counted_T.to(context.device)]
            for part, counted_T in zip(parts, counted, strict=True)
        )
        values_2N = torch.cat([values_2N, *both], dim=1)
    num_own = torch.tensor([values_2N.shape[1]], dtype=torch.float64, device=context.device)
    sums_3 = _reduced(torch.cat([num_own, values_2N.sum(1)]), dist.ReduceOp.SUM, context)
    num_tokens, means_2 = sums_3[0], sums_3[1:] / sums_3[0]
    # About the mean, in a second round: the difference of two large sums would be rounding.
    squares_2 = _reduced((values_2N - means_2[:, None]).square().sum(1), dist.ReduceOp.SUM, context)
    stds_2 = (squares_2 / num_tokens).sqrt()
    # A rank without tokens has no say.
    nothing_2 = torch.full_like(means_2, -torch.inf)[:, None]
    ends_22 = torch.stack(
        [torch.cat([nothing_2, signed_2N], dim=1).amax(1) for signed_2N in (values_2N, -values_2N)]
    )
    highest_2, minus_lowest_2 = _reduced(ends_22, dist.ReduceOp.MAX, context)
    logprob, entropy = (
        Spread(mean=mean, std=std, max=highest, min=-minus_lowest)
        for mean, std, highest, minus_lowest in torch.stack(
            [means_2, stds_2, highest_2, minus_lowest_2], dim=1
        ).tolist()
    )
    return Probe(logprob=logprob, entropy=entropy, num_tokens=int(num_tokens))


def _reduced(values: Tensor, op: Any, context: ParallelContext) -> Tensor:
    dist.all_reduce(values, op=op, group=context.world_group)
    return values

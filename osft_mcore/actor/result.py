"""What an optimizer update did: sums of its micro-batches, and the figures made of them.

Shape suffix: T response tokens of a micro-batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from osft_mcore.actor.batching import MicroBatch
from osft_mcore.config.schema import AlgorithmConfig
from osft_mcore.loss.linear import TokenLoss
from osft_mcore.loss.objectives import kl_estimate
from osft_mcore.parallel.groups import ParallelContext

_NUM_TOTALS: Final = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What one optimizer update did, the same on every rank."""

    loss: float
    """Weighted sum that was minimised."""
    nll: float
    """Mean negative log-likelihood of the response tokens at tau_train."""
    entropy: float
    """Mean entropy at tau_train, in nats."""
    grad_norm: float
    """Before clipping."""
    num_tokens: int
    """Response tokens in the loss."""
    padding_share: float
    """Of the positions that the forward passes of all ranks computed."""
    agreement: "Agreement | None"
    """Present when the examples carry the rollout engine's log-probabilities."""
    kl: float | None = None
    """Mean algorithm.kl_kind of the response tokens; None without a reference model."""
    not_finite: str = ""
    """What was NaN or infinite, on any rank; empty if nothing was."""

    @property
    def skipped(self) -> bool:
        """True if weights and optimizer were therefore left as they are."""
        return bool(self.not_finite)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """|log pi_rollout - log pi_actor| over the same tokens at the same temperature."""

    mean: float
    max_by_replica: tuple[float, ...]

    @property
    def max(self) -> float:
        """Over all replicas."""
        return max(self.max_by_replica)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """One micro-batch's contribution to the statistics."""

    totals: Tensor
    """loss, nll, entropy, KL estimate, tokens in the loss, |logprob diff|, tokens compared"""
    peaks: Tensor
    """Largest |logprob diff| by rollout replica."""

    @staticmethod
    def of(
        batch: MicroBatch, found: TokenLoss, algorithm: AlgorithmConfig, *, num_replicas: int
    ) -> "Sums":
        """Of what the loss found, and what the rollout engine and the reference said."""
        trained_T = batch.weights_T > 0
        kl_T = torch.zeros_like(found.logprobs_train_T)
        if algorithm.kl_coef > 0:
            kl_T = kl_estimate(
                found.logprobs_train_T, batch.reference_logprobs_T, algorithm.kl_kind
            )
        diff_T = (found.logprobs_sample_T - batch.rollout_logprobs_T).abs()
        compared_T = ~batch.rollout_logprobs_T.isnan()
        # A NaN on the actor's side must reach the gate, not vanish in a maximum.
        diff_T = torch.where(compared_T, diff_T.nan_to_num(nan=torch.inf), 0.0)
        peaks = torch.zeros(num_replicas, device=found.loss.device)
        peaks.scatter_reduce_(0, batch.replicas_T, diff_T, reduce="amax")
        totals = torch.stack(
            [
                found.loss.detach().double(),
                -found.logprobs_train_T[trained_T].double().sum(),
                found.entropy_T[trained_T].double().sum(),
                kl_T[trained_T].double().sum(),
                trained_T.sum().double(),
                diff_T.double().sum(),
                compared_T.sum().double(),
            ]
        )
        return Sums(totals=totals, peaks=peaks)


def update_result(
    parts: Sequence[Sums],
    context: ParallelContext,
    *,
    grad_norm: float,
    padding: float,
    with_kl: bool,
) -> UpdateResult:
    """The figures of all ranks' micro-batches. Collective over the world."""
    totals, peaks = _reduce(parts, context, grad_norm=grad_norm)
    loss, nll, entropy, kl, num_tokens, diff, num_compared, broken_norm = totals.tolist()
    if broken_norm:
        # Perhaps another rank's: copies of the model are reduced alike, but may break alone.
        grad_norm = broken_norm
    agreement = None
    if num_compared:
        agreement = Agreement(mean=diff / num_compared, max_by_replica=tuple(peaks.tolist()))
    return UpdateResult(
        loss=loss,
        nll=nll / max(num_tokens, 1),
        entropy=entropy / max(num_tokens, 1),
        grad_norm=grad_norm,
        num_tokens=int(num_tokens),
        padding_share=padding,
        agreement=agreement,
        kl=kl / max(num_tokens, 1) if with_kl else None,
        not_finite=_not_finite(
            {
                **({"KL to the reference model": kl} if with_kl else {}),
                "loss": loss,
                "gradient norm": grad_norm,
            }
        ),
    )


def _reduce(
    parts: Sequence[Sums], context: ParallelContext, *, grad_norm: float
) -> tuple[Tensor, Tensor]:
    """Sums and maxima over micro-batches and ranks; each token counted once.

    One more total is 0 if `grad_norm` is finite on all ranks, else NaN or infinity.
    """
    totals = torch.zeros(_NUM_TOTALS + 1, dtype=torch.float64, device=context.device)
    peaks = torch.zeros(context.topology.num_replicas, device=context.device)
    if context.is_last_stage and context.coordinates.tp_rank == 0:
        for part in parts:
            totals[:_NUM_TOTALS] += part.totals
            peaks = torch.maximum(peaks, part.peaks)
    totals[_NUM_TOTALS] = 0.0 if math.isfinite(grad_norm) else grad_norm
    dist.all_reduce(totals, group=context.world_group)
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX, group=context.world_group)
    return totals, peaks


def _not_finite(figures: Mapping[str, float]) -> str:
    broken = [(name, value) for name, value in figures.items() if not math.isfinite(value)]
    return ", ".join(f"{name} is {value}" for name, value in broken)

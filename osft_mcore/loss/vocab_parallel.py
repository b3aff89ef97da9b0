"""Log-probabilities and entropy of tokens from hidden states, over a sharded vocabulary.

Shape suffixes: T tokens, H hidden, V this rank's vocabulary rows, C tokens of one chunk.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_TOKENS = 1024
"""Tokens whose [C, V] logits exist at once."""


class TokenStatistics(NamedTuple):
    """Per-token results [T], float32 (float64 from float64). The first two carry gradients."""

    logprobs_train_T: Tensor
    """log softmax(z / tau_train)[target]"""
    entropy_T: Tensor
    """Entropy of softmax(z / tau_train), in nats; never negative."""
    logprobs_sample_T: Tensor
    """log softmax(z / tau_sample)[target], without gradient: the agreement gate's."""


def token_statistics(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    *,
    tau_train: float,
    tau_sample: float,
    vocab: int,
    tp_group: dist.ProcessGroup,
) -> TokenStatistics:
    """Log-probabilities at two temperatures and the entropy, logits never kept.

    With z = hidden @ weight.T over the first `vocab` columns (the rest is padding):
    lp = z_y/tau - logsumexp(z/tau);  d lp/dz = (onehot - p)/tau;  dH/dz = -p (log p + H)/tau.

    Collective over tp_group, forward and backward; targets are global ids, the same on every
    rank of the group. The gradient of hidden_TH is complete (summed over the group), that of
    weight_VH is this shard's.
    """
    out: tuple[Tensor, Tensor, Tensor] = _TokenStatistics.apply(  # type: ignore[no-untyped-call]
        hidden_TH, weight_VH, targets_T, tau_train, tau_sample, vocab, tp_group
    )
    return TokenStatistics(*out)


class _TokenStatistics(torch.autograd.Function):
    """Forward keeps [T] statistics only; backward recomputes the logits chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets_T: Tensor,
        tau_train: float,
        tau_sample: float,
        vocab: int,
        tp_group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_real = _num_real_columns(weight_VH, vocab, tp_group)
        start = tp_group.rank() * weight_VH.shape[0]
        weight = _at_least_float32(weight_VH[:num_real])
        parts = [
            _local_statistics(h, weight, t - start, (tau_train, tau_sample))
            for h, t in _chunks(hidden_TH, targets_T)
        ]
        maxima_2T, sums_2T, weighted_T, target_T = (
            torch.cat(column, dim=-1) for column in zip(*parts, strict=True)
        )
        maxima_2T, log_sums_2T, entropy_T, target_T = _combine(
            maxima_2T, sums_2T, weighted_T, target_T, tp_group
        )
        ctx.save_for_backward(
            hidden_TH, weight_VH, targets_T - start, maxima_2T[0], log_sums_2T[0], entropy_T
        )
        ctx.tau_train, ctx.num_real, ctx.tp_group = tau_train, num_real, tp_group
        # Subtracting the maximum first keeps the digits of a log-probability close to zero.
        logprobs_train_T = target_T / tau_train - maxima_2T[0] - log_sums_2T[0]
        logprobs_sample_T = target_T / tau_sample - maxima_2T[1] - log_sums_2T[1]
        ctx.mark_non_differentiable(logprobs_sample_T)
        return logprobs_train_T, entropy_T, logprobs_sample_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, local_targets_T, max_T, log_sum_T, entropy_T = ctx.saved_tensors
        grad_logprobs_T, grad_entropy_T = grads[0], grads[1]
        weight = _at_least_float32(weight_VH[: ctx.num_real])
        grad_hidden_TH = torch.empty_like(hidden_TH, dtype=entropy_T.dtype)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=entropy_T.dtype)
        for start in range(0, hidden_TH.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            hidden = _at_least_float32(hidden_TH[rows])
            log_p_CV = (hidden @ weight.T).div_(ctx.tau_train).sub_(max_T[rows, None])
            log_p_CV.sub_(log_sum_T[rows, None])
            grad_CV = _grad_logits(
                log_p_CV, local_targets_T[rows], grad_logprobs_T[rows], grad_entropy_T[rows],
                entropy_T[rows],
            ).div_(ctx.tau_train)  # fmt: skip
            grad_hidden_TH[rows] = grad_CV @ weight
            grad_weight_VH[: ctx.num_real] += grad_CV.T @ hidden
        dist.all_reduce(grad_hidden_TH, group=ctx.tp_group)
        grad_hidden = grad_hidden_TH.to(hidden_TH.dtype)
        return grad_hidden, grad_weight_VH.to(weight_VH.dtype), None, None, None, None, None


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _num_real_columns(weight_VH: Tensor, vocab: int, tp_group: dist.ProcessGroup) -> int:
    """Rows of this shard that are vocabulary, not padding (padding is at the end)."""
    start = tp_group.rank() * weight_VH.shape[0]
    return max(0, min(weight_VH.shape[0], vocab - start))


def _chunks(hidden_TH: Tensor, targets_T: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [
        (hidden_TH[start : start + CHUNK_TOKENS], targets_T[start : start + CHUNK_TOKENS])
        for start in range(0, hidden_TH.shape[0], CHUNK_TOKENS)
    ]


def _local_statistics(
    hidden_CH: Tensor, weight_VH: Tensor, local_targets_C: Tensor, taus: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This shard's maxima m [2, C], sums of exp(d) [2, C], sum of d exp(d) [C], target logit [C].

    d = z/tau - m for each tau; the sum of d exp(d) is for the first alone. A shard of nothing but
    padding contributes the lowest m and zeros.
    """
    hidden_CH = _at_least_float32(hidden_CH)
    lowest = torch.finfo(hidden_CH.dtype).min
    maxima_2C = hidden_CH.new_full((2, hidden_CH.shape[0]), lowest)
    sums_2C, weighted_C, target_C = (
        torch.zeros_like(maxima_2C), torch.zeros_like(maxima_2C[0]), torch.zeros_like(maxima_2C[0])
    )  # fmt: skip
    if weight_VH.shape[0] == 0:
        return maxima_2C, sums_2C, weighted_C, target_C
    logits_CV = hidden_CH @ weight_VH.T
    mine_C = (local_targets_C >= 0) & (local_targets_C < weight_VH.shape[0])
    index_C = torch.where(mine_C, local_targets_C, 0)
    target_C = torch.where(mine_C, logits_CV.gather(1, index_C[:, None])[:, 0], target_C)
    top_C = logits_CV.amax(dim=1)
    for i, tau in enumerate(taus):
        maxima_2C[i] = top_C / tau
        below_CV = (logits_CV / tau).sub_(maxima_2C[i][:, None])
        exp_CV = below_CV.exp()
        sums_2C[i] = exp_CV.sum(dim=1)
        if i == 0:
            weighted_C = exp_CV.mul_(below_CV).sum(dim=1)
    return maxima_2C, sums_2C, weighted_C, target_C


def _combine(
    maxima_2T: Tensor,
    sums_2T: Tensor,
    weighted_T: Tensor,
    target_T: Tensor,
    tp_group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Global (max [2, T], log sum exp(z/tau - max) [2, T], entropy [T], target logit [T]).

    With d = z/tau - max, H = log sum exp(d) - sum p d: no term is negative, none is large.
    """
    global_2T = maxima_2T.clone()
    dist.all_reduce(global_2T, op=dist.ReduceOp.MAX, group=tp_group)
    below_2T = maxima_2T - global_2T
    scale_2T = below_2T.exp()
    weighted_T = (weighted_T + sums_2T[0] * below_2T[0]) * scale_2T[0]
    packed = torch.cat([sums_2T * scale_2T, weighted_T[None], target_T[None]])
    dist.all_reduce(packed, group=tp_group)
    log_sums_2T = packed[:2].log()
    return global_2T, log_sums_2T, log_sums_2T[0] - packed[2] / packed[0], packed[3]


def _grad_logits(
    log_p_CV: Tensor,
    local_targets_C: Tensor,
    grad_logprobs_C: Tensor,
    grad_entropy_C: Tensor,
    entropy_C: Tensor,
) -> Tensor:
    """tau * dL/dz for upstream gradients of the log-probability and the entropy."""
    p_CV = log_p_CV.exp()
    factor_CV = -grad_entropy_C[:, None] * (log_p_CV + entropy_C[:, None])
    grad_CV = p_CV.mul_(factor_CV.sub_(grad_logprobs_C[:, None]))
    mine_C = (local_targets_C >= 0) & (local_targets_C < log_p_CV.shape[1])
    rows_C = mine_C.nonzero()[:, 0]
    grad_CV[rows_C, local_targets_C[rows_C]] += grad_logprobs_C[rows_C]
    return grad_CV

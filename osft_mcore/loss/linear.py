"""Loss of tokens from hidden states and a sharded output weight, without their logits in memory.

Shape suffixes: T tokens, C tokens of one chunk, H hidden, V this rank's vocabulary rows, R ranks.
z are logits, d how far they lie below the largest of the same rank and token.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from osft_mcore.loss.projection import add_weight_gradient, hidden_gradient, logits, widened

CHUNK_ELEMENTS: Final = 2**25
"""Logits that exist at once, in two buffers: 2 * 128 MiB in float32."""
LEAST_CHUNK: Final = 64
"""Tokens; products of fewer are slow."""
_LOWEST: Final = -1e30
"""Largest logit of a shard of nothing but padding; its distance from others is finite."""

Objective = Callable[[Tensor, Tensor, slice], Tensor]
"""(log-probabilities [C], entropies [C], both at tau_train, their place in T) -> losses [C].

A token's loss may depend on its own two figures alone. Autograd differentiates it.
"""


class TokenLoss(NamedTuple):
    """The loss, and what it was made of: per token [T], at least float32, without gradient."""

    loss: Tensor
    """Sum of the objective over tokens. Carries the gradient."""
    logprobs_train_T: Tensor
    """log softmax(z / tau_train)[target]"""
    entropy_T: Tensor
    """Entropy of softmax(z / tau_train), in nats; never negative."""
    logprobs_sample_T: Tensor
    """log softmax(z / tau_sample)[target]: the agreement gate's."""


def token_loss(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    objective: Objective,
    *,
    tau_train: float,
    tau_sample: float,
    vocab: int,
    tp_group: dist.ProcessGroup,
    recompute: bool = False,
    partial_hidden_grad: bool = False,
) -> TokenLoss:
    """Sum of `objective` over tokens, and the statistics at two temperatures, in one pass.

    With z = hidden @ weight.T over the first `vocab` columns (the rest is padding):
    lp = z_y/tau - logsumexp(z/tau);  d lp/dz = (onehot - p)/tau;  dH/dz = -p (log p + H)/tau.
    A token's loss depends on its own lp and H alone: the gradient of its z is known as soon as they
    are, and those of hidden_TH and weight_VH are formed in the forward pass, three products in all.
    Both are kept until the backward pass, which may come once, and scaled there.
    `recompute` keeps [T] figures instead and computes z again then, a fourth product; the gradient
    of weight_VH goes straight to its main_grad, so that it never exists a second time.

    Collective over tp_group, forward and backward; targets are global ids, the same on every rank
    of the group. The gradient of weight_VH is this shard's; it is added to weight_VH.main_grad
    where there is one. That of hidden_TH is summed over the group, unless `partial_hidden_grad`:
    then the caller does (with sequence parallelism, as it scatters).
    """
    start = tp_group.rank() * weight_VH.shape[0]
    plan = _Plan(
        objective=objective,
        tau_train=tau_train,
        tau_sample=tau_sample,
        num_rows=weight_VH.shape[0],
        num_real=max(0, min(weight_VH.shape[0], vocab - start)),
        tp_group=tp_group,
        recompute=recompute,
        partial_hidden_grad=partial_hidden_grad,
        trains=torch.is_grad_enabled() and (hidden_TH.requires_grad or weight_VH.requires_grad),
    )
    out: tuple[Tensor, Tensor, Tensor, Tensor] = _TokenLoss.apply(  # type: ignore[no-untyped-call]
        hidden_TH, weight_VH, targets_T - start, plan
    )
    return TokenLoss(*out)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """All that is not a tensor."""

    objective: Objective
    tau_train: float
    tau_sample: float
    num_rows: int
    """Of this shard, the same on every rank of the group: chunks are."""
    num_real: int
    """Those that are vocabulary; padding comes after them."""
    tp_group: dist.ProcessGroup
    recompute: bool
    partial_hidden_grad: bool
    trains: bool

    @property
    def chunk_size(self) -> int:
        """Tokens whose logits exist at once."""
        return max(LEAST_CHUNK, CHUNK_ELEMENTS // max(self.num_rows, 1))

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """All tokens, `chunk_size` at a time."""
        size = self.chunk_size
        # At least one, so that no tokens at all are not a case of their own.
        return (slice(at, min(at + size, num_tokens)) for at in range(0, max(num_tokens, 1), size))

    def buffers(self, hidden_TH: Tensor) -> Tensor:
        """Two of a chunk's logits [2, C, V], for all chunks: fresh memory costs page faults."""
        size = min(self.chunk_size, hidden_TH.shape[0])
        return hidden_TH.new_empty((2, size, self.num_real), dtype=widened(hidden_TH.dtype))


class _Statistics(NamedTuple):
    """Of C or T tokens."""

    max_C: Tensor
    """Largest z of this shard."""
    log_share_C: Tensor
    """log of what exp(d / tau_train) must be multiplied by to be a probability."""
    logprobs_train_C: Tensor
    entropy_C: Tensor
    logprobs_sample_C: Tensor


class _Slopes(NamedTuple):
    """Of the loss, by the two figures of a token."""

    by_logprob_C: Tensor
    by_entropy_C: Tensor | None
    """None: the objective does not use the entropy."""


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, local_targets_T: Tensor, plan: _Plan
    ) -> tuple[Tensor, ...]:
        exact = widened(hidden_TH.dtype)
        weight = weight_VH[: plan.num_real]
        kept = _Kept.empty(hidden_TH, weight_VH) if plan.trains and not plan.recompute else None
        loss = hidden_TH.new_zeros((), dtype=exact)
        parts: list[tuple[_Statistics, _Slopes]] = []
        buffers_2CV = plan.buffers(hidden_TH)
        for rows in plan.chunks(hidden_TH.shape[0]):
            below_CV, exp_CV = buffers_2CV[:, : rows.stop - rows.start]
            logits(hidden_TH[rows], weight, out_CV=below_CV)
            max_C = _below_max(below_CV)
            statistics = _statistics(below_CV, exp_CV, max_C, local_targets_T[rows], plan)
            losses_C, slopes = _slopes(plan, statistics, rows)
            loss += losses_C.sum()
            parts.append((statistics, slopes))
            if kept is not None:
                _into_logit_gradient(
                    exp_CV, below_CV, local_targets_T[rows], statistics, slopes, plan.tau_train
                )
                kept.add(rows, exp_CV, hidden_TH[rows], weight)
        statistics = _Statistics(*_joined([part for part, _ in parts]))
        outputs = (loss, *statistics[2:])
        ctx.mark_non_differentiable(*outputs[1:])
        if plan.trains:
            # The weight itself: a saved tensor comes back without its main_grad.
            ctx.weight, ctx.plan, ctx.kept, ctx.dtype = weight_VH, plan, kept, hidden_TH.dtype
            if plan.recompute:
                slopes = _Slopes(*_joined([part for _, part in parts]))
                ctx.statistics, ctx.slopes = statistics, slopes
                ctx.save_for_backward(hidden_TH, local_targets_T)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        main_grad = getattr(ctx.weight, "main_grad", None)
        if plan.recompute:
            kept = _recomputed(ctx, grads[0], main_grad)
        else:
            assert ctx.kept is not None, "the gradients were handed out by an earlier backward pass"
            kept, ctx.kept = ctx.kept, None
            kept.hidden_TH.mul_(grads[0])
            kept.weight_VH.mul_(grads[0])
        if plan.tp_group.size() > 1 and not plan.partial_hidden_grad:
            dist.all_reduce(kept.hidden_TH, group=plan.tp_group)
        grad_weight_VH: Tensor | None = None
        if main_grad is None:
            grad_weight_VH = kept.weight_VH.to(ctx.weight.dtype)
        elif kept.weight_VH is not main_grad:
            main_grad.add_(kept.weight_VH)
        return kept.hidden_TH.to(ctx.dtype), grad_weight_VH, None, None


class _Kept(NamedTuple):
    """Gradients of hidden states and weight, widened; mostly they wait for the backward pass."""

    hidden_TH: Tensor
    """Of this shard's part of the loss."""
    weight_VH: Tensor

    @classmethod
    def empty(
        cls, hidden_TH: Tensor, weight_VH: Tensor, main_grad: Tensor | None = None
    ) -> "_Kept":
        """Nothing is added yet, unless to `main_grad`: it is taken where it is as wide."""
        exact = widened(hidden_TH.dtype)
        if main_grad is None or main_grad.dtype != exact:
            main_grad = torch.zeros_like(weight_VH, dtype=exact)
        return cls(torch.empty_like(hidden_TH, dtype=exact), main_grad)

    def add(self, rows: slice, grad_CV: Tensor, hidden_CH: Tensor, weight: Tensor) -> None:
        """Take the gradient of a chunk's logits to both; `weight` without padding."""
        self.hidden_TH[rows] = hidden_gradient(grad_CV, weight)
        add_weight_gradient(self.weight_VH[: weight.shape[0]], grad_CV, hidden_CH)


def _recomputed(ctx: Any, scale: Tensor, main_grad: Tensor | None) -> _Kept:
    """The gradients times `scale`, from logits computed again; the weight's onto `main_grad`."""
    hidden_TH, local_targets_T = ctx.saved_tensors
    plan: _Plan = ctx.plan
    weight = ctx.weight[: plan.num_real]
    kept = _Kept.empty(hidden_TH, ctx.weight, main_grad)
    buffers_2CV = plan.buffers(hidden_TH)
    by_logprob_T, by_entropy_T = ctx.slopes
    for rows in plan.chunks(hidden_TH.shape[0]):
        statistics = _Statistics(*(at_T[rows] for at_T in ctx.statistics))
        slopes = _Slopes(
            by_logprob_T[rows] * scale, None if by_entropy_T is None else by_entropy_T[rows] * scale
        )
        below_CV, exp_CV = buffers_2CV[:, : rows.stop - rows.start]
        logits(hidden_TH[rows], weight, out_CV=below_CV)
        below_CV.sub_(statistics.max_C[:, None])
        torch.mul(below_CV, 1 / plan.tau_train, out=exp_CV).exp_()
        _into_logit_gradient(
            exp_CV, below_CV, local_targets_T[rows], statistics, slopes, plan.tau_train
        )
        kept.add(rows, exp_CV, hidden_TH[rows], weight)
    return kept


def _below_max(logits_CV: Tensor) -> Tensor:
    """Put d in place of z; the largest z."""
    if logits_CV.shape[1] == 0:
        return logits_CV.new_full((logits_CV.shape[0],), _LOWEST)
    max_C = logits_CV.amax(dim=1)
    logits_CV.sub_(max_C[:, None])
    return max_C


def _statistics(
    below_CV: Tensor, exp_CV: Tensor, max_C: Tensor, local_targets_C: Tensor, plan: _Plan
) -> _Statistics:
    """Over all shards; exp_CV becomes this shard's exp(d / tau_train). One collective."""
    torch.mul(below_CV, 1 / plan.tau_sample, out=exp_CV).exp_()
    sum_sample_C = exp_CV.sum(dim=1)
    torch.mul(below_CV, 1 / plan.tau_train, out=exp_CV).exp_()
    sum_train_C = exp_CV.sum(dim=1)
    # sum of exp(d / tau) d, without a third buffer
    weighted_C = torch.bmm(exp_CV[:, None, :], below_CV[:, :, None])[:, 0, 0]
    mine_C, index_C1 = _own_targets(local_targets_C, below_CV)
    target_C = torch.zeros_like(max_C)
    if plan.num_real:
        target_C = torch.where(mine_C, below_CV.gather(1, index_C1)[:, 0], 0.0)
    own_6C = torch.stack(
        [max_C, sum_train_C, weighted_C, sum_sample_C, target_C, mine_C.to(max_C.dtype)]
    )
    return _over_shards(own_6C, plan)


def _own_targets(local_targets_C: Tensor, below_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Whether this shard has the target's row; and the row [C, 1], 0 where it has not.

    Masks, not indices of what is true: a GPU would have to be waited for.
    """
    mine_C = (local_targets_C >= 0) & (local_targets_C < below_CV.shape[1])
    return mine_C, torch.where(mine_C, local_targets_C, 0)[:, None]


def _over_shards(own_6C: Tensor, plan: _Plan) -> _Statistics:
    """Combine each shard's max z, sums and target. Collective over tp_group.

    With D = max z of all shards: H = log sum exp(d/tau) - sum p d/tau, d below D; no term is
    negative, none is large.
    """
    all_R6C = own_6C[None]
    if plan.tp_group.size() > 1:
        shards = [torch.empty_like(own_6C) for _ in range(plan.tp_group.size())]
        dist.all_gather(shards, own_6C, group=plan.tp_group)
        all_R6C = torch.stack(shards)
    max_RC, train_RC, weighted_RC, sample_RC, target_RC, mine_RC = all_R6C.unbind(dim=1)
    top_C = max_RC.amax(dim=0)
    below_RC = max_RC - top_C
    scale_RC = (below_RC / plan.tau_train).exp()
    sum_C = (train_RC * scale_RC).sum(dim=0)
    # A shard of padding is far below: 0 * far, then times exp(far) = 0.
    weighted_C = ((weighted_RC + train_RC * below_RC) * scale_RC).sum(dim=0) / plan.tau_train
    sample_C = (sample_RC * (below_RC / plan.tau_sample).exp()).sum(dim=0)
    target_C = torch.where(mine_RC > 0, target_RC + below_RC, 0.0).sum(dim=0)
    log_sum_C = sum_C.log()
    return _Statistics(
        max_C=own_6C[0],
        log_share_C=(own_6C[0] - top_C) / plan.tau_train - log_sum_C,
        logprobs_train_C=target_C / plan.tau_train - log_sum_C,
        entropy_C=log_sum_C - weighted_C / sum_C,
        logprobs_sample_C=target_C / plan.tau_sample - sample_C.log(),
    )


def _slopes(plan: _Plan, statistics: _Statistics, rows: slice) -> tuple[Tensor, _Slopes]:
    """Losses [C] of a chunk, and their slopes."""
    with torch.set_grad_enabled(plan.trains):
        logprobs_C = statistics.logprobs_train_C.requires_grad_(plan.trains)
        entropy_C = statistics.entropy_C.requires_grad_(plan.trains)
        losses_C = plan.objective(logprobs_C, entropy_C, rows)
        if not plan.trains:
            return losses_C, _Slopes(torch.zeros_like(logprobs_C), None)
        by_logprob_C, by_entropy_C = torch.autograd.grad(
            losses_C.sum(), (logprobs_C, entropy_C), allow_unused=True
        )
    logprobs_C.requires_grad_(False)
    entropy_C.requires_grad_(False)
    if by_logprob_C is None:
        by_logprob_C = torch.zeros_like(logprobs_C)
    return losses_C.detach(), _Slopes(by_logprob_C, by_entropy_C)


def _into_logit_gradient(
    exp_CV: Tensor,
    below_CV: Tensor,
    local_targets_C: Tensor,
    statistics: _Statistics,
    slopes: _Slopes,
    tau: float,
) -> None:
    """Turn exp(d / tau) into the gradient of the loss by z. Spoils below_CV.

    by_logprob (onehot - p) / tau - by_entropy p (log p + H) / tau
    """
    by_logprob_C, by_entropy_C = slopes
    share_C = statistics.log_share_C.exp() / tau
    if by_entropy_C is None:
        exp_CV.mul_((-by_logprob_C * share_C)[:, None])
    else:
        # -(by_logprob + by_entropy (log p + H)), with log p = d / tau + log_share
        constant_C = by_entropy_C * (statistics.log_share_C + statistics.entropy_C) + by_logprob_C
        below_CV.mul_((by_entropy_C / tau)[:, None]).add_(constant_C[:, None])
        exp_CV.mul_(-share_C[:, None]).mul_(below_CV)
    if below_CV.shape[1]:
        mine_C, index_C1 = _own_targets(local_targets_C, below_CV)
        exp_CV.scatter_add_(1, index_C1, torch.where(mine_C, by_logprob_C / tau, 0.0)[:, None])


def _joined(parts: list[Any]) -> Iterator[Any]:
    """Chunks' figures one after the other; None where they are."""
    for column in zip(*parts, strict=True):
        yield None if column[0] is None else torch.cat(column)

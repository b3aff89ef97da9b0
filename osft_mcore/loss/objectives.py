"""What is minimised: the loss of a token, and the weight that it has in the loss of the batch.

Every aggregation of the reference systems is a weighted sum of token losses whose weights depend
on lengths only, so they are computed once from the whole optimizer batch, and the loss of a
micro-batch is a plain dot product. Shape suffixes: T tokens, C tokens of one chunk.
"""

from collections.abc import Sequence
from typing import Final, Literal

import torch
from torch import Tensor

from osft_mcore.config.schema import AlgorithmConfig
from osft_mcore.loss.linear import Objective

Aggregation = Literal[
    "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
]
KlKind = Literal["k1", "abs", "k2", "k3"]
K3_LARGEST_RATIO: Final = 20.0
"""Bound of |log-ratio| in k3, so that its exponential stays finite."""
K3_LARGEST: Final = 10.0
"""Bound of |k3|, in nats."""


def token_weights(
    lengths: Sequence[int], *, aggregation: Aggregation, max_response_tokens: int
) -> list[float]:
    """Weight of each token of each response, for one normalisation group.

    With B responses of lengths n_b, N = sum n_b and R = max_response_tokens:
    token-mean 1/N; seq-mean-token-sum 1/B; seq-mean-token-mean 1/(B n_b);
    seq-mean-token-sum-norm 1/R (Dr.GRPO; a sum over sequences, as published).
    A length of 0 stands for a response that is not trained on: weight 0, counted nowhere.
    """
    num_sequences = sum(length > 0 for length in lengths)

    def weight(length: int) -> float:
        if length == 0:
            return 0.0
        match aggregation:
            case "token-mean":
                return 1.0 / sum(lengths)
            case "seq-mean-token-sum":
                return 1.0 / num_sequences
            case "seq-mean-token-mean":
                return 1.0 / (num_sequences * length)
            case "seq-mean-token-sum-norm":
                return 1.0 / max_response_tokens

    return [weight(length) for length in lengths]


def batch_weights(
    groups: Sequence[Sequence[int]],
    *,
    aggregation: Aggregation,
    normalization: Literal["global", "per_microbatch"],
    max_response_tokens: int,
) -> list[list[float]]:
    """Token weights for an optimizer batch, given response lengths per micro-batch.

    `groups` holds the micro-batches of all data-parallel ranks. `global` normalises over the
    whole batch and does not depend on the grouping; `per_microbatch` is the mean over
    micro-batches of each one's own aggregate, as the reference systems compute it.
    """
    if normalization == "per_microbatch":
        return [
            [
                weight / len(groups)
                for weight in token_weights(
                    lengths, aggregation=aggregation, max_response_tokens=max_response_tokens
                )
            ]
            for lengths in groups
        ]
    flat = iter(
        token_weights(
            [length for lengths in groups for length in lengths],
            aggregation=aggregation,
            max_response_tokens=max_response_tokens,
        )
    )
    return [[next(flat) for _ in lengths] for lengths in groups]


def kl_estimate(logprobs_T: Tensor, reference_logprobs_T: Tensor, kind: KlKind) -> Tensor:
    """An estimate of KL(model || reference) from the log-probability of each token, in nats, [T].

    With d = lp - lp_ref:
    k1: d;  abs: |d|;  k2: d^2 / 2;
    k3: clamp(exp(x) - x - 1, -10, 10) with x = clamp(-d, -20, 20).
    k1, k2, k3: J. Schulman, "Approximating KL Divergence", 2020. Clamps: as in verl's `kl_penalty`,
    where k1, k2, k3 are also called kl, mse, low_var_kl. Where a clamp acts, the gradient is 0.
    """
    above_T = logprobs_T - reference_logprobs_T
    match kind:
        case "k1":
            return above_T
        case "abs":
            return above_T.abs()
        case "k2":
            return above_T.square() / 2
        case "k3":
            ratio_T = (-above_T).clamp(-K3_LARGEST_RATIO, K3_LARGEST_RATIO)
            # exp(x) - 1 in one piece: near 0, where all begins, the difference is lost to rounding.
            return (torch.expm1(ratio_T) - ratio_T).clamp(-K3_LARGEST, K3_LARGEST)


def token_objective(
    weights_T: Tensor, algorithm: AlgorithmConfig, reference_logprobs_T: Tensor | None = None
) -> Objective:
    """The objective that `algorithm` names, for tokens with weights w in the loss.

    With lp_t = log softmax(z_t / tau)[y_t] and H_t the entropy of softmax(z_t / tau), in nats:
    cross_entropy: sum_t w_t (-lp_t); entropy: entropy_coef * sum_t w_t H_t, where the sampled
    tokens are constants: the gradient passes through H alone.
    With kl_coef > 0: + kl_coef * sum_t w_t kl_estimate(lp_t, lp_ref_t), where lp_ref_t, the
    reference model's at the same tau, is a constant.
    """
    objective = _without_kl(weights_T, algorithm)
    if algorithm.kl_coef == 0:
        return objective
    assert reference_logprobs_T is not None, "kl_coef > 0 needs the reference's log-probabilities"
    coef, kind = algorithm.kl_coef, algorithm.kl_kind

    def with_kl(logprobs_C: Tensor, entropy_C: Tensor, rows: slice) -> Tensor:
        kl_C = kl_estimate(logprobs_C, reference_logprobs_T[rows], kind)
        return objective(logprobs_C, entropy_C, rows) + coef * weights_T[rows] * kl_C

    return with_kl


def _without_kl(weights_T: Tensor, algorithm: AlgorithmConfig) -> Objective:
    match algorithm.objective:
        case "cross_entropy":
            return lambda logprobs_C, _, rows: -weights_T[rows] * logprobs_C
        case "entropy":
            coef = algorithm.entropy_coef
            return lambda _, entropy_C, rows: coef * weights_T[rows] * entropy_C

"""What is minimised: the loss of a token, and the weight that it has in the loss of the batch.

Every aggregation of the reference systems is a weighted sum of token losses whose weights depend
on lengths only, so they are computed once from the whole optimizer batch, and the loss of a
micro-batch is a plain dot product. Shape suffixes: T tokens, C tokens of one chunk.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from osft_mcore.config.schema import AlgorithmConfig
from osft_mcore.loss.linear import Objective

Aggregation = Literal[
    "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
]


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


def token_objective(weights_T: Tensor, algorithm: AlgorithmConfig) -> Objective:
    """The objective that `algorithm` names, for tokens with weights w in the loss.

    With lp_t = log softmax(z_t / tau)[y_t] and H_t the entropy of softmax(z_t / tau), in nats:
    cross_entropy: sum_t w_t (-lp_t); entropy: entropy_coef * sum_t w_t H_t, where the sampled
    tokens are constants: the gradient passes through H alone.
    """
    match algorithm.objective:
        case "cross_entropy":
            return lambda logprobs_C, _, rows: -weights_T[rows] * logprobs_C
        case "entropy":
            coef = algorithm.entropy_coef
            return lambda _, entropy_C, rows: coef * weights_T[rows] * entropy_C

"""The loss of tokens for both objectives: every figure here is worked out by hand."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from osft_mcore.config.schema import AlgorithmConfig
from osft_mcore.loss.objectives import token_objective, token_weights

LENGTHS = (1, 3)
MAX_RESPONSE = 10
# Two responses. Sums of -log p: 1 and 9; of the entropies: 0.5 and 3.
LOGPROBS = (-1.0, -2.0, -3.0, -4.0)
ENTROPIES = (0.5, 0.5, 1.0, 1.5)


def weights_of(algorithm: AlgorithmConfig) -> Tensor:
    by_response = token_weights(
        LENGTHS, aggregation=algorithm.aggregation, max_response_tokens=MAX_RESPONSE
    )
    return torch.tensor(by_response).repeat_interleave(torch.tensor(LENGTHS))


def loss_and_slopes(
    algorithm: AlgorithmConfig, borders: tuple[int, ...] = (0, 4)
) -> tuple[float, list[float], list[float]]:
    """The loss over chunks of tokens; its slopes by log-probability and by entropy."""
    objective = token_objective(weights_of(algorithm), algorithm)
    logprobs_T = torch.tensor(LOGPROBS, requires_grad=True)
    entropy_T = torch.tensor(ENTROPIES, requires_grad=True)
    chunks = [slice(start, end) for start, end in pairwise(borders)]
    loss = torch.cat([objective(logprobs_T[rows], entropy_T[rows], rows) for rows in chunks]).sum()
    slopes = torch.autograd.grad(
        loss, (logprobs_T, entropy_T), allow_unused=True, materialize_grads=True
    )
    return loss.item(), slopes[0].tolist(), slopes[1].tolist()


@pytest.mark.parametrize(
    ("aggregation", "cross_entropy", "entropy", "weights"),
    [
        # (1 + 9) / 4, (0.5 + 3) / 4
        ("token-mean", 2.5, 0.875, [0.25, 0.25, 0.25, 0.25]),
        # (1 + 9) / 2, (0.5 + 3) / 2
        ("seq-mean-token-sum", 5.0, 1.75, [0.5, 0.5, 0.5, 0.5]),
        # (1 + 9/3) / 2, (0.5 + 3/3) / 2
        ("seq-mean-token-mean", 2.0, 0.75, [1 / 2, 1 / 6, 1 / 6, 1 / 6]),
        # (1 + 9) / 10, (0.5 + 3) / 10
        ("seq-mean-token-sum-norm", 1.0, 0.35, [0.1, 0.1, 0.1, 0.1]),
    ],
)
def test_known_losses(
    aggregation: str, cross_entropy: float, entropy: float, weights: list[float]
) -> None:
    """The gradient of each objective passes through its own figure alone."""
    loss, by_logprob, by_entropy = loss_and_slopes(AlgorithmConfig(aggregation=aggregation))
    assert loss == pytest.approx(cross_entropy, rel=1e-6)
    assert by_logprob == pytest.approx([-w for w in weights], rel=1e-6)
    assert by_entropy == [0, 0, 0, 0]
    algorithm = AlgorithmConfig(aggregation=aggregation, objective="entropy", entropy_coef=3.0)
    loss, by_logprob, by_entropy = loss_and_slopes(algorithm)
    assert loss == pytest.approx(3 * entropy, rel=1e-6)
    assert by_logprob == [0, 0, 0, 0]
    assert by_entropy == pytest.approx([3 * w for w in weights], rel=1e-6)


@pytest.mark.parametrize("objective", ["cross_entropy", "entropy"])
def test_chunks_of_tokens_take_their_own_weights(objective: str) -> None:
    algorithm = AlgorithmConfig(objective=objective, aggregation="seq-mean-token-mean")
    whole, by_logprob, by_entropy = loss_and_slopes(algorithm)
    parts = loss_and_slopes(algorithm, borders=(0, 1, 3, 4))
    assert parts[0] == pytest.approx(whole, rel=1e-6)
    assert parts[1:] == (by_logprob, by_entropy)

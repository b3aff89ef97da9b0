"""The KL estimates of one token: every figure here is worked out by hand."""

import math
from itertools import pairwise

import pytest
import torch

from osft_mcore.config.schema import AlgorithmConfig
from osft_mcore.loss.objectives import KlKind, kl_estimate, token_objective

LN2 = math.log(2)


def value_and_slope(kind: KlKind, above: float) -> tuple[float, float]:
    """Where the model's log-probability is `above` the reference's; by the model's alone."""
    logprobs = torch.tensor([-30.0 + above], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-30.0], dtype=torch.float64)
    value = kl_estimate(logprobs, reference, kind)
    [slope] = torch.autograd.grad(value.sum(), logprobs)
    return value.item(), slope.item()


@pytest.mark.parametrize(
    ("kind", "above", "value", "slope"),
    [
        ("k1", 3.0, 3.0, 1.0),
        ("k1", -3.0, -3.0, 1.0),
        ("k1", -40.0, -40.0, 1.0),
        ("abs", 3.0, 3.0, 1.0),
        ("abs", -3.0, 3.0, -1.0),
        ("abs", 0.0, 0.0, 0.0),
        ("k2", 3.0, 4.5, 3.0),
        ("k2", -3.0, 4.5, -3.0),
        ("k2", 0.0, 0.0, 0.0),
        # x = -d: exp(x) - x - 1, with the slope 1 - exp(x)
        ("k3", LN2, 0.5 + LN2 - 1, 0.5),
        ("k3", -LN2, 2 - LN2 - 1, -1.0),
        ("k3", 0.0, 0.0, 0.0),
        ("k3", 10.0, math.exp(-10) + 9, 1 - math.exp(-10)),
        # From x = 2.61 on, and below x = -11, it would be more than 10.
        ("k3", -2.6, math.exp(2.6) - 3.6, 1 - math.exp(2.6)),
        ("k3", -2.7, 10.0, 0.0),
        ("k3", 11.5, 10.0, 0.0),
        # Beyond 20 x stands still; exp(800) would be infinite.
        ("k3", -25.0, 10.0, 0.0),
        ("k3", 25.0, 10.0, 0.0),
        ("k3", -800.0, 10.0, 0.0),
    ],
)
def test_known_values_and_slopes(kind: KlKind, above: float, value: float, slope: float) -> None:
    assert value_and_slope(kind, above) == pytest.approx((value, slope), rel=1e-12, abs=1e-14)


def test_a_small_k3_is_not_lost_to_rounding_in_fp32() -> None:
    """The first updates of a run have nothing else."""
    x = 1e-3
    found = kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.0 + x]), "k3").item()
    assert found == pytest.approx(math.exp(x) - x - 1, rel=2e-3)


@pytest.mark.parametrize("kind", ["k1", "abs", "k2", "k3"])
def test_nan_stays_nan(kind: KlKind) -> None:
    """A clamp must not hide it from the check that skips an update."""
    assert kl_estimate(torch.tensor([math.nan]), torch.tensor([-1.0]), kind).isnan().all()


LOGPROBS, REFERENCE, WEIGHTS = (-1.0, -2.0, -4.0), (-1.5, -4.0, -3.0), (0.25, 0.5, 0.0)
ENTROPIES = (0.5, 1.5, 9.0)


def loss_and_slopes(
    algorithm: AlgorithmConfig, borders: tuple[int, ...] = (0, 3)
) -> tuple[float, list[float], list[float]]:
    logprobs_T = torch.tensor(LOGPROBS, requires_grad=True)
    entropy_T = torch.tensor(ENTROPIES, requires_grad=True)
    objective = token_objective(torch.tensor(WEIGHTS), algorithm, torch.tensor(REFERENCE))
    chunks = [slice(start, stop) for start, stop in pairwise(borders)]
    loss = torch.cat([objective(logprobs_T[c], entropy_T[c], c) for c in chunks]).sum()
    slopes = torch.autograd.grad(
        loss, (logprobs_T, entropy_T), allow_unused=True, materialize_grads=True
    )
    return loss.item(), slopes[0].tolist(), slopes[1].tolist()


def test_the_penalty_has_the_weights_of_its_tokens() -> None:
    """d = 0.5, 2, -1: sum w d^2 / 2 = 0.25 * 0.125 + 0.5 * 2 = 1.03125."""
    algorithm = AlgorithmConfig(kl_coef=0.1, kl_kind="k2")
    loss, by_logprob, by_entropy = loss_and_slopes(algorithm)
    assert loss == pytest.approx(0.25 * 1 + 0.5 * 2 + 0.1 * 1.03125)
    assert by_logprob == pytest.approx([-0.25 + 0.1 * 0.25 * 0.5, -0.5 + 0.1 * 0.5 * 2, 0.0])
    assert by_entropy == [0, 0, 0]


def test_the_entropy_may_be_penalised_too() -> None:
    """Its coefficient is its own."""
    algorithm = AlgorithmConfig(objective="entropy", entropy_coef=3.0, kl_coef=0.1, kl_kind="k2")
    loss, by_logprob, by_entropy = loss_and_slopes(algorithm)
    assert loss == pytest.approx(3 * (0.25 * 0.5 + 0.5 * 1.5) + 0.1 * 1.03125)
    assert by_logprob == pytest.approx([0.1 * 0.25 * 0.5, 0.1 * 0.5 * 2, 0.0])
    assert by_entropy == pytest.approx([0.75, 1.5, 0.0])


def test_chunks_take_their_own_reference() -> None:
    algorithm = AlgorithmConfig(kl_coef=0.7)
    whole, parts = loss_and_slopes(algorithm), loss_and_slopes(algorithm, borders=(0, 1, 3))
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    assert parts[1:] == whole[1:]


def test_k1_only_scales_the_cross_entropy_down() -> None:
    """As the schema says: at 0.25 it leaves three quarters of the gradient, in every direction."""
    _, plain, _ = loss_and_slopes(AlgorithmConfig())
    _, found, _ = loss_and_slopes(AlgorithmConfig(kl_coef=0.25, kl_kind="k1"))
    assert found == pytest.approx([0.75 * slope for slope in plain])


def test_without_a_penalty_no_reference_is_needed() -> None:
    algorithm = AlgorithmConfig(kl_coef=0.1)
    weights_T = torch.tensor(WEIGHTS)
    token_objective(weights_T, AlgorithmConfig())
    with pytest.raises(AssertionError, match="needs the reference's log-probabilities"):
        token_objective(weights_T, algorithm)

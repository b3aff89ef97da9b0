"""Token weights: by hand, and against the reference systems' loss on padded matrices."""

import random
from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from osft_mcore.loss.objectives import Aggregation, batch_weights, token_weights

AGGREGATIONS = get_args(Aggregation)
MAX_RESPONSE = 10


def padded_loss(losses: Sequence[Sequence[float]], aggregation: str) -> float:
    """The reference systems' aggregation of a [B, R] matrix of token losses under a mask."""
    matrix = torch.zeros(len(losses), MAX_RESPONSE, dtype=torch.float64)
    mask = torch.zeros_like(matrix)
    for row, values in enumerate(losses):
        matrix[row, : len(values)] = torch.tensor(values, dtype=torch.float64)
        mask[row, : len(values)] = 1
    sums: Tensor = (matrix * mask).sum(dim=1)
    match aggregation:
        case "token-mean":
            loss = sums.sum() / mask.sum()
        case "seq-mean-token-sum":
            loss = sums.mean()
        case "seq-mean-token-mean":
            loss = (sums / mask.sum(dim=1)).mean()
        case "seq-mean-token-sum-norm":
            loss = sums.sum() / MAX_RESPONSE
        case _:
            raise AssertionError(aggregation)
    return float(loss)


def weighted_loss(
    groups: Sequence[Sequence[Sequence[float]]], weights: Sequence[Sequence[float]]
) -> float:
    """The sum that a step minimises, over micro-batches `groups` of responses of token losses."""
    return sum(
        weight * sum(losses)
        for group, group_weights in zip(groups, weights, strict=True)
        for losses, weight in zip(group, group_weights, strict=True)
    )


def lengths_of(groups: Sequence[Sequence[Sequence[float]]]) -> list[list[int]]:
    return [[len(losses) for losses in group] for group in groups]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token-mean", [1 / 7, 1 / 7, 1 / 7]),
        ("seq-mean-token-sum", [1 / 3, 1 / 3, 1 / 3]),
        ("seq-mean-token-mean", [1 / 3, 1 / 6, 1 / 12]),
        ("seq-mean-token-sum-norm", [1 / 10, 1 / 10, 1 / 10]),
    ],
)
def test_weights_of_lengths_1_2_4(aggregation: Aggregation, expected: list[float]) -> None:
    found = token_weights([1, 2, 4], aggregation=aggregation, max_response_tokens=MAX_RESPONSE)
    assert found == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_untrained_response_counts_nowhere(aggregation: Aggregation) -> None:
    with_untrained = token_weights(
        [0, 1, 0, 2, 4, 0], aggregation=aggregation, max_response_tokens=MAX_RESPONSE
    )
    without = token_weights([1, 2, 4], aggregation=aggregation, max_response_tokens=MAX_RESPONSE)
    assert with_untrained == [0, without[0], 0, without[1], without[2], 0]


@pytest.mark.parametrize("normalization", ["global", "per_microbatch"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_to_train_on_is_no_weight_at_all(
    aggregation: Aggregation, normalization: str
) -> None:
    found = batch_weights(
        [[0, 0], [0]],
        aggregation=aggregation,
        normalization=normalization,
        max_response_tokens=MAX_RESPONSE,
    )
    assert found == [[0, 0], [0]]


def test_normalisations_differ_on_uneven_micro_batches() -> None:
    """Lengths (1, 1) and (6): one token in eight, or one in two of one micro-batch in two."""
    groups = [[1, 1], [6]]
    over_batch = batch_weights(
        groups, aggregation="token-mean", normalization="global", max_response_tokens=10
    )
    per_group = batch_weights(
        groups, aggregation="token-mean", normalization="per_microbatch", max_response_tokens=10
    )
    assert over_batch == [[1 / 8, 1 / 8], [1 / 8]]
    assert per_group == [[1 / 4, 1 / 4], [1 / 12]]


def test_a_micro_batch_without_training_still_counts_as_one() -> None:
    """The reference systems divide by the number of micro-batches, whatever they hold."""
    found = batch_weights(
        [[2, 2], [0, 0]],
        aggregation="token-mean",
        normalization="per_microbatch",
        max_response_tokens=10,
    )
    assert found == [[1 / 8, 1 / 8], [0, 0]]


def random_losses(seed: int) -> list[list[list[float]]]:
    """Four micro-batches of three responses of 1 to MAX_RESPONSE token losses."""
    rng = random.Random(seed)
    return [
        [[rng.uniform(0, 5) for _ in range(rng.randint(1, MAX_RESPONSE))] for _ in range(3)]
        for _ in range(4)
    ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_global_is_the_reference_on_the_whole_batch(aggregation: Aggregation, seed: int) -> None:
    groups = random_losses(seed)
    weights = batch_weights(
        lengths_of(groups),
        aggregation=aggregation,
        normalization="global",
        max_response_tokens=MAX_RESPONSE,
    )
    expected = padded_loss([losses for group in groups for losses in group], aggregation)
    assert weighted_loss(groups, weights) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_per_microbatch_is_the_mean_of_the_reference_over_micro_batches(
    aggregation: Aggregation, seed: int
) -> None:
    groups = random_losses(seed)
    weights = batch_weights(
        lengths_of(groups),
        aggregation=aggregation,
        normalization="per_microbatch",
        max_response_tokens=MAX_RESPONSE,
    )
    expected = sum(padded_loss(group, aggregation) for group in groups) / len(groups)
    assert weighted_loss(groups, weights) == pytest.approx(expected, rel=1e-12)


lengths = st.lists(st.integers(0, 3000), min_size=1, max_size=24)


@given(lengths=lengths, cuts=st.sets(st.integers(1, 23)), aggregation=st.sampled_from(AGGREGATIONS))
def test_global_weights_do_not_depend_on_the_grouping(
    lengths: list[int], cuts: set[int], aggregation: Aggregation
) -> None:
    """Exactly: the same floats in the same order, however the batch is cut."""
    inner = sorted(cut for cut in cuts if cut < len(lengths))
    borders = [0, *inner, len(lengths)]
    groups = [lengths[borders[i] : borders[i + 1]] for i in range(len(borders) - 1)]

    def weights(groups: list[list[int]]) -> list[list[float]]:
        return batch_weights(
            groups, aggregation=aggregation, normalization="global", max_response_tokens=3072
        )

    grouped = weights(groups)
    assert [len(group) for group in grouped] == [len(group) for group in groups]
    assert [w for group in grouped for w in group] == weights([lengths])[0]


@given(lengths=lengths)
def test_a_constant_loss_keeps_its_value_under_the_means(lengths: list[int]) -> None:
    """token-mean and seq-mean-token-mean are averages: their weights sum to one."""
    for aggregation in ("token-mean", "seq-mean-token-mean"):
        weights = token_weights(lengths, aggregation=aggregation, max_response_tokens=3072)
        total = sum(weight * length for weight, length in zip(weights, lengths, strict=True))
        assert total == pytest.approx(1.0 if any(lengths) else 0.0, rel=1e-12)

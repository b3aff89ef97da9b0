"""Which sequences share a pass: all of them somewhere, within the budget, little padding."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osft_mcore.actor.splitting import (
    PASS_TOKENS,
    Split,
    budget_split,
    fixed_split,
    padded,
    padding_share,
)

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=24)


def long_tailed(num: int, seed: int) -> list[int]:
    """Prompts of 30 tokens, answers whose logarithms are normal, cut off at 3072."""
    generator = random.Random(seed)
    return [30 + min(3072, int(500 * generator.lognormvariate(0, 0.9))) for _ in range(num)]


def positions(lengths: list[int], numbers: list[int], multiple: int) -> int:
    return len(numbers) * padded(max(lengths[number] for number in numbers), multiple)


def test_fixed_by_hand() -> None:
    assert fixed_split(8, dp=2, micro_batch_size=2) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_a_budget_by_hand() -> None:
    lengths = [1000, 10, 990, 20, 500, 500]
    split = budget_split(lengths, dp=1, max_tokens=2000, pad_to_multiple=1, group=1)
    assert split == [[[0, 2], [4, 5], [3, 1]]]
    # 2000 + 1000 + 40 positions for 3020 tokens.
    assert padding_share(lengths, split, pad_to_multiple=1) == pytest.approx(1 - 3020 / 3040)
    # Half of the budget: the long ones go alone, and 500 fit twice.
    split = budget_split(lengths, dp=1, max_tokens=1000, pad_to_multiple=1, group=1)
    assert split == [[[0], [2], [4, 5], [3, 1]]]


@given(
    lengths=LENGTHS, dp=st.integers(1, 3), group=st.integers(1, 3), multiple=st.sampled_from([1, 4])
)
def test_every_sequence_once_within_the_budget(
    lengths: list[int], dp: int, group: int, multiple: int
) -> None:
    lengths = lengths * dp * group
    split = budget_split(lengths, dp=dp, max_tokens=64, pad_to_multiple=multiple, group=group)
    passes = [numbers for rank in split for numbers in rank]
    assert sorted(itertools.chain(*passes)) == list(range(len(lengths)))
    assert len(split) == dp
    for rank in split:
        assert rank
        assert len(rank) % group == 0
    for numbers in passes:
        assert numbers
        assert len(numbers) == 1 or positions(lengths, numbers, multiple) <= 64


@given(lengths=LENGTHS)
def test_no_other_cut_of_the_sorted_sequences_is_cheaper(lengths: list[int]) -> None:
    lengths = lengths[:9]

    def cost(split: list[list[int]]) -> int:
        return sum(positions(lengths, numbers, 1) + PASS_TOKENS for numbers in split)

    ordered = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    allowed = []
    for cuts in itertools.product((False, True), repeat=len(lengths) - 1):
        parts: list[list[int]] = [[ordered[0]]]
        for number, cut in zip(ordered[1:], cuts, strict=True):
            if cut:
                parts.append([])
            parts[-1].append(number)
        if all(len(part) == 1 or positions(lengths, part, 1) <= 100 for part in parts):
            allowed.append(cost(parts))
    split = budget_split(lengths, dp=1, max_tokens=100, pad_to_multiple=1, group=1)
    assert cost(split[0]) == min(allowed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num", "dp"), [(64, 1), (64, 4), (512, 8)])
def test_little_padding_and_equal_work_on_long_tails(num: int, dp: int, seed: int) -> None:
    lengths = long_tailed(num, seed)

    def work(split: Split) -> list[int]:
        return [sum(positions(lengths, numbers, 1) for numbers in rank) for rank in split]

    split = budget_split(lengths, dp=dp, max_tokens=8192, pad_to_multiple=1, group=1)
    assert padding_share(lengths, split, pad_to_multiple=1) <= 0.05
    of_four = fixed_split(num, dp=dp, micro_batch_size=4)
    assert padding_share(lengths, of_four, pad_to_multiple=1) >= 0.3
    mean = sum(work(split)) / dp
    assert max(work(split)) <= 1.1 * mean

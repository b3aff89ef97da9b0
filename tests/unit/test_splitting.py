"""Which sequences share a pass: all of them somewhere, within the budget, equal work."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osft_mcore.actor.splitting import (
    Rows,
    Split,
    budget_split,
    fixed_split,
    padding_share,
    rows_of,
)
from osft_mcore.config.schema import ParallelConfig

PACKED = Rows(packed=True)
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=24)


def long_tailed(num: int, seed: int) -> list[int]:
    """Prompts of 30 tokens, answers whose logarithms are normal, cut off at 3072."""
    generator = random.Random(seed)
    return [30 + min(3072, int(500 * generator.lognormvariate(0, 0.9))) for _ in range(num)]


def test_positions_by_hand() -> None:
    assert Rows(packed=False).num_positions([5, 2, 4]) == 15
    assert Rows(packed=False, row_multiple=4).num_positions([5, 2, 4]) == 24
    assert PACKED.num_positions([5, 2, 4]) == 11
    assert Rows(packed=True, row_multiple=4).num_positions([5, 2, 4]) == 12
    assert Rows(packed=True, row_multiple=4).num_positions([5, 2, 1]) == 8
    cut = Rows(packed=True, sequence_multiple=4, row_multiple=8)
    assert (cut.padded([5, 2, 4]), cut.num_positions([5, 2, 4])) == ([8, 4, 4], 16)
    assert (cut.padded([5, 2, 5]), cut.num_positions([5, 2, 5])) == ([8, 4, 8], 24)


def test_rows_of_a_layout() -> None:
    def rows(*, packed: bool, cp: int, sp: bool) -> tuple[bool, int, int]:
        found = rows_of(ParallelConfig(cp=cp, tp=3, sequence_parallel=sp), packed=packed)
        return found.packed, found.sequence_multiple, found.row_multiple

    assert rows(packed=False, cp=1, sp=False) == (False, 1, 1)
    assert rows(packed=True, cp=1, sp=True) == (True, 1, 3)
    assert rows(packed=False, cp=2, sp=False) == (True, 4, 4)
    assert rows(packed=True, cp=4, sp=True) == (True, 8, 24)


def test_fixed_by_hand() -> None:
    assert fixed_split(8, dp=2, micro_batch_size=2) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_a_budget_by_hand() -> None:
    lengths = [1000, 10, 990, 20, 500, 500]
    split = budget_split(lengths, dp=1, max_tokens=2000, rows=PACKED, group=1)
    # Two passes will do; the longest goes first, each to where there is least so far.
    assert split == [[[0, 5, 1], [2, 4, 3]]]
    assert padding_share(lengths, split, PACKED) == 0
    # Each has 1510 tokens.
    share = padding_share(lengths, split, Rows(packed=True, row_multiple=8))
    assert share == pytest.approx(1 - 3020 / 3024)
    # 3020 tokens do not fit into three times 1000.
    split = budget_split(lengths, dp=1, max_tokens=1000, rows=PACKED, group=1)
    assert split == [[[0], [2], [4, 3], [5, 1]]]
    split = budget_split(lengths, dp=1, max_tokens=2000, rows=PACKED, group=3)
    assert split == [[[0, 1], [2, 3], [4, 5]]]


@given(
    lengths=LENGTHS,
    dp=st.integers(1, 3),
    group=st.integers(1, 3),
    cut=st.sampled_from([1, 4, 6]),
    multiple=st.sampled_from([1, 4]),
    budget=st.sampled_from([10, 62]),
)
def test_every_sequence_once_within_the_budget(
    lengths: list[int], dp: int, group: int, cut: int, multiple: int, budget: int
) -> None:
    """The smaller budget is below some sequences: these are alone."""
    lengths = lengths * dp * group
    rows = Rows(packed=True, sequence_multiple=cut, row_multiple=cut * multiple)
    split = budget_split(lengths, dp=dp, max_tokens=budget, rows=rows, group=group)
    passes = [numbers for rank in split for numbers in rank]
    assert sorted(itertools.chain(*passes)) == list(range(len(lengths)))
    assert len(split) == dp
    for rank in split:
        assert rank
        assert len(rank) % group == 0
    for numbers in passes:
        assert numbers
        # Each is padded by itself, then the row.
        positions = sum(math.ceil(lengths[number] / cut) * cut for number in numbers)
        positions = math.ceil(positions / (cut * multiple)) * cut * multiple
        assert len(numbers) == 1 or positions <= budget


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num", "dp"), [(64, 1), (64, 4), (512, 8)])
def test_few_passes_and_equal_work_on_long_tails(num: int, dp: int, seed: int) -> None:
    lengths, budget = long_tailed(num, seed), 8192

    def sums(numbers: list[list[int]], power: int) -> list[int]:
        return [sum(lengths[number] ** power for number in part) for part in numbers]

    split: Split = budget_split(lengths, dp=dp, max_tokens=budget, rows=PACKED, group=1)
    ranks = [[number for numbers in rank for number in numbers] for rank in split]
    tokens = sums(ranks, 1)
    assert max(tokens) <= 1.1 * sum(tokens) / dp
    for rank, num_tokens in zip(split, tokens, strict=True):
        assert len(rank) <= math.ceil(num_tokens / budget) + 1
        assert max(sums(rank, 1)) <= 1.1 * num_tokens / len(rank)
    of_four = fixed_split(num, dp=dp, micro_batch_size=4)
    assert padding_share(lengths, split, Rows(packed=True, row_multiple=8)) <= 0.002
    assert padding_share(lengths, of_four, Rows(packed=False)) >= 0.3

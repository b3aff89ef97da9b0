"""Which sequences share a forward pass, and on which data-parallel rank; pure.

A split lists, for each data-parallel rank, its micro-batches; a micro-batch lists the numbers of
its sequences.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Final

Split = list[list[list[int]]]

PASS_TOKENS: Final = 64
"""What a forward pass costs by itself, as a number of tokens: without it, lonely sequences win."""


def fixed_split(num_sequences: int, *, dp: int, micro_batch_size: int) -> Split:
    """Equally many sequences in each micro-batch, in their order, dealt to the ranks in turn.

    num_sequences must be a multiple of dp * micro_batch_size.
    """
    assert num_sequences % (dp * micro_batch_size) == 0, "config/check.py lets only this through"
    numbers = range(num_sequences)
    groups = [
        list(numbers[start : start + micro_batch_size])
        for start in range(0, num_sequences, micro_batch_size)
    ]
    return [groups[dp_rank::dp] for dp_rank in range(dp)]


def budget_split(
    lengths: Sequence[int], *, dp: int, max_tokens: int, pad_to_multiple: int, group: int
) -> Split:
    """Micro-batches of at most `max_tokens` tokens with their padding, of which little is needed.

    Sequences are sorted by length and dealt to the ranks back and forth, so that ranks have the
    same work; each rank cuts its own where padding and passes cost least. `group`: a rank's number
    of micro-batches is a multiple of it, for which len(lengths) must be one of dp * group. A
    sequence longer than `max_tokens` is alone.
    """
    assert len(lengths) % (dp * group) == 0, "config/check.py lets only this through"
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    dealt: list[list[int]] = [[] for _ in range(dp)]
    for place, number in enumerate(order):
        turn, position = divmod(place, dp)
        dealt[dp - 1 - position if turn % 2 else position].append(number)
    split = []
    for numbers in dealt:
        widths = [padded(lengths[number], pad_to_multiple) for number in numbers]
        sizes = _sizes(widths, max_tokens)
        while len(sizes) % group:
            _halve_largest(sizes)
        bounds = pairwise(accumulate(sizes, initial=0))
        split.append([numbers[start:stop] for start, stop in bounds])
    return split


def padding_share(lengths: Sequence[int], split: Split, *, pad_to_multiple: int) -> float:
    """Of the positions of all forward passes of all ranks, the share that is padding."""
    passes = [[lengths[number] for number in numbers] for rank in split for numbers in rank]
    positions = sum(len(found) * padded(max(found), pad_to_multiple) for found in passes)
    return 1.0 - sum(lengths) / positions


def padded(length: int, multiple: int) -> int:
    """The smallest multiple that is no smaller than `length`."""
    return -(-length // multiple) * multiple


def _sizes(widths: Sequence[int], max_tokens: int) -> list[int]:
    """Cuts of sequences sorted from wide to narrow, by shortest path; sizes of the parts in order.

    Cost of a part: its positions, padding included, and PASS_TOKENS.
    """
    best, sizes = [0], [0]
    for stop in range(1, len(widths) + 1):
        costs: dict[int, int] = {}
        for start in range(stop - 1, -1, -1):
            positions = widths[start] * (stop - start)
            if costs and positions > max_tokens:
                # Further back they are wider, and more.
                break
            costs[stop - start] = best[start] + positions + PASS_TOKENS
        size = min(costs, key=costs.__getitem__)
        best.append(costs[size])
        sizes.append(size)
    cuts: list[int] = []
    while (done := len(widths) - sum(cuts)) > 0:
        cuts.append(sizes[done])
    return cuts[::-1]


def _halve_largest(sizes: list[int]) -> None:
    place = max(range(len(sizes)), key=sizes.__getitem__)
    half = sizes[place] // 2
    assert half > 0, "there are enough sequences for a multiple"
    sizes[place : place + 1] = [sizes[place] - half, half]

"""Which sequences share a forward pass, and on which data-parallel rank; pure.

A split lists, for each data-parallel rank, its micro-batches; a micro-batch lists the numbers of
its sequences.
"""

from collections.abc import Sequence
from heapq import heapreplace
from itertools import count

Split = list[list[list[int]]]


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
    """Few micro-batches of at most `max_tokens` positions when packed, with like sums of lengths.

    Sequences are sorted by length and dealt to the ranks back and forth, so that ranks have the
    same work, that of attention too. `group`: a rank's number of micro-batches is a multiple of it,
    for which len(lengths) must be one of dp * group. A sequence longer than `max_tokens` is alone.
    """
    assert len(lengths) % (dp * group) == 0, "config/check.py lets only this through"
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    dealt: list[list[int]] = [[] for _ in range(dp)]
    for place, number in enumerate(order):
        turn, position = divmod(place, dp)
        dealt[dp - 1 - position if turn % 2 else position].append(number)

    def fits(numbers: Sequence[int]) -> bool:
        found = [lengths[number] for number in numbers]
        size = num_positions(found, packed=True, pad_to_multiple=pad_to_multiple)
        return len(numbers) == 1 or size <= max_tokens

    def parts(numbers: Sequence[int]) -> list[list[int]]:
        least = -(-sum(lengths[number] for number in numbers) // (max_tokens * group)) * group
        # It ends: with as many parts as sequences each is alone. No part is empty before.
        least = min(least, len(numbers))
        tries = (_even_parts(numbers, lengths, num) for num in count(least, group))
        return next(found for found in tries if all(map(fits, found)))

    return [parts(numbers) for numbers in dealt]


def padding_share(
    lengths: Sequence[int], split: Split, *, packed: bool, pad_to_multiple: int
) -> float:
    """Of the positions of all forward passes of all ranks, the share that is padding."""
    positions = sum(
        num_positions(
            [lengths[number] for number in numbers], packed=packed, pad_to_multiple=pad_to_multiple
        )
        for rank in split
        for numbers in rank
    )
    return 1.0 - sum(lengths) / positions


def num_positions(lengths: Sequence[int], *, packed: bool, pad_to_multiple: int) -> int:
    """What a micro-batch computes, padding included: one row of all sequences, or one for each."""
    rows, width = (1, sum(lengths)) if packed else (len(lengths), max(lengths))
    return rows * -(-width // pad_to_multiple) * pad_to_multiple


def _even_parts(numbers: Sequence[int], lengths: Sequence[int], num: int) -> list[list[int]]:
    """Sequences sorted from long to short, each to the part that has the fewest tokens so far."""
    parts: list[list[int]] = [[] for _ in range(num)]
    sums = [(0, place) for place in range(num)]
    for number in numbers:
        total, place = sums[0]
        parts[place].append(number)
        heapreplace(sums, (total + lengths[number], place))
    return parts

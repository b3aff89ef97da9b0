"""Which sequences share a forward pass, and on which data-parallel rank; pure.

A split lists, for each data-parallel rank, its micro-batches; a micro-batch lists the numbers of
its sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import count

from osft_mcore.config.schema import ParallelConfig

Split = list[list[list[int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """How the sequences of a micro-batch lie in rows, and what these are padded to."""

    packed: bool
    """All in one row, end to end; else each in a row of its own."""
    sequence_multiple: int = 1
    """Of a packed sequence's length."""
    row_multiple: int = 1
    """Of a row's length."""

    def padded(self, lengths: Sequence[int]) -> list[int]:
        """Lengths that the sequences of a micro-batch take in their rows."""
        if self.packed:
            return [_rounded_up(length, self.sequence_multiple) for length in lengths]
        return [_rounded_up(max(lengths), self.row_multiple)] * len(lengths)

    def num_positions(self, lengths: Sequence[int]) -> int:
        """What a micro-batch computes, padding included."""
        total = sum(self.padded(lengths))
        return _rounded_up(total, self.row_multiple) if self.packed else total


def rows_of(parallel: ParallelConfig, *, packed: bool) -> Rows:
    """What the layout asks of the rows.

    Context-parallel ranks take two runs of every sequence each (`MicroBatch.share`), and rows are
    always packed then. Sequence parallelism cuts what a rank has of a row once more.
    """
    cut = 2 * parallel.cp if parallel.cp > 1 else 1
    return Rows(
        packed=packed or parallel.cp > 1,
        sequence_multiple=cut,
        row_multiple=cut * parallel.tp if parallel.sequence_parallel else cut,
    )


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
    lengths: Sequence[int], *, dp: int, max_tokens: int, rows: Rows, group: int
) -> Split:
    """Few micro-batches of at most `max_tokens` positions, with like sums of lengths.

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
        return len(numbers) == 1 or rows.num_positions(found) <= max_tokens

    def parts(numbers: Sequence[int]) -> list[list[int]]:
        least = -(-sum(lengths[number] for number in numbers) // (max_tokens * group)) * group
        # It ends: with as many parts as sequences each is alone. No part is empty before.
        least = min(least, len(numbers))
        tries = (_even_parts(numbers, lengths, num) for num in count(least, group))
        return next(found for found in tries if all(map(fits, found)))

    return [parts(numbers) for numbers in dealt]


def padding_share(lengths: Sequence[int], split: Split, rows: Rows) -> float:
    """Of the positions of all forward passes of all ranks, the share that is padding."""
    positions = sum(
        rows.num_positions([lengths[number] for number in numbers])
        for rank in split
        for numbers in rank
    )
    return 1.0 - sum(lengths) / positions


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _even_parts(numbers: Sequence[int], lengths: Sequence[int], num: int) -> list[list[int]]:
    """Sequences sorted from long to short, each to the part that has the fewest tokens so far."""
    parts: list[list[int]] = [[] for _ in range(num)]
    sums = [(0, place) for place in range(num)]
    for number in numbers:
        total, place = sums[0]
        parts[place].append(number)
        heapreplace(sums, (total + lengths[number], place))
    return parts

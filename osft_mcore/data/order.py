"""Which prompts a step uses: a pure function of (seed, step), so that a resumed run continues."""

import numpy as np

from osft_mcore.errors import DataError


def steps_per_epoch(num_items: int, batch_size: int) -> int:
    """Full batches in one pass; the remainder of each pass is left out.

    Raises DataError if not even one batch can be filled.
    """
    if num_items < batch_size:
        raise DataError(
            f"train.prompts_per_step = {batch_size}, but data.train has only {num_items} usable "
            "rows; lower the one or add to the other"
        )
    return num_items // batch_size


def epoch_order(num_items: int, seed: int, epoch: int, shuffle: bool) -> tuple[int, ...]:
    """Positions 0..num_items-1 in the order of one pass; every pass is shuffled anew."""
    if not shuffle:
        return tuple(range(num_items))
    generator = np.random.Generator(np.random.PCG64([seed % 2**64, epoch]))
    return tuple(generator.permutation(num_items).tolist())


def batch_rows(
    num_items: int, batch_size: int, seed: int, step: int, shuffle: bool
) -> tuple[int, ...]:
    """Positions of the items of a step; `step` counts from 0."""
    epoch, batch = divmod(step, steps_per_epoch(num_items, batch_size))
    order = epoch_order(num_items, seed, epoch, shuffle)
    return order[batch * batch_size : (batch + 1) * batch_size]


def single_pass(num_items: int, batch_size: int, seed: int, shuffle: bool) -> list[tuple[int, ...]]:
    """Positions of all items, once, in batches: those of the first epoch, then what it leaves out.

    The last one may be smaller.
    """
    order = epoch_order(num_items, seed, 0, shuffle)
    return [order[start : start + batch_size] for start in range(0, num_items, batch_size)]

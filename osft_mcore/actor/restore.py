"""Fills the training state from a checkpoint that any layout has written."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from osft_mcore.actor.training_state import StateTensor
from osft_mcore.checkpoint.index import KINDS
from osft_mcore.checkpoint.source import CheckpointSource, read_index
from osft_mcore.weights.fill import filled
from osft_mcore.weights.layout import Layout


def restore(
    state: Sequence[StateTensor], layouts: Mapping[str, Layout], shard: int, folder: Path
) -> None:
    """Fill every tensor of `state`, one parameter at a time. Not collective.

    Reads the rows that this rank's `layouts` name; where several shards of the checkpoint hold
    them, `shard` is preferred, so that the same layout gets its own bits back. Raises WeightError
    if the checkpoint lacks anything.
    """
    index = read_index(folder)
    for kind in KINDS:
        wanted = {tensor.param: tensor for tensor in state if tensor.kind == kind}
        if not wanted:
            continue
        dtypes = {name: tensor.tensor.dtype for name, tensor in wanted.items()}
        source = CheckpointSource(folder, index, kind)
        for name, param in filled(
            {name: layouts[name] for name in wanted},
            source.layouts,
            source.rows,
            dtype=dtypes.__getitem__,
            rank=shard,
        ):
            held = wanted[name]
            held.tensor.view(-1).copy_(param.view(-1)[held.start : held.stop])

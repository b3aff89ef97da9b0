"""Does a checkpoint hold every row where the layout that it states has it?

Its index says which rows each tensor holds, so whoever reads it by the index alone believes a
mistaken index. Here it is held against the table of parameters, which does not come from it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

from osft_mcore.checkpoint.assemble import has_engine_names, megatron_shards
from osft_mcore.checkpoint.index import INDEX, KINDS, Index
from osft_mcore.config.model_shape import ModelShape
from osft_mcore.errors import WeightError
from osft_mcore.parallel.topology import Topology
from osft_mcore.weights.layout import Interval, Layout

_AXES: Final = ("tp", "cp", "pp", "vpp", "dp")
_OF_VOCAB: Final = ("embedding.word_embeddings.weight", "output_layer.weight")


def check_layout(index: Index, shape: ModelShape) -> str:
    """Hold every parameter of the index against the layout at the index's tp, pp and vpp.

    What the index does not state is taken from what it holds: the padding of the vocabulary, and
    whether names are Transformer Engine's. Returns what was found; raises WeightError with
    every parameter that is missing, unknown, or holds other rows, by shard.
    """
    topology = _topology(index)
    padded = _vocab_height(index) * topology.tp
    engine = has_engine_names(index.layouts)
    # Of its multiples the least that holds the vocabulary is the height itself.
    expected = megatron_shards(
        shape, topology, vocab_multiple=max(1, padded), transformer_engine=engine
    )
    problems = [
        problem
        for shard, layouts in expected.items()
        for problem in _differences(shard, index.layouts[shard], layouts)
    ]
    problems += _without_tensors(index)
    if problems:
        raise WeightError("\n".join(problems))
    names = "Transformer Engine's names" if engine else "the local spec's names"
    return (
        f"{sum(map(len, expected.values()))} parameters in {len(expected)} shards hold the rows "
        f"that {_words(topology)} ask for; {names}, vocabulary padded to {padded}"
    )


def _topology(index: Index) -> Topology:
    """What the index states. Raises WeightError if that is no layout, or shards are not its own."""
    # Checkpoints of before there was context parallelism do not state it.
    stated = {"cp": 1, **index.topology}
    problems = [
        f"{INDEX} states {axis} {stated.get(axis)}, expected 1 or more"
        for axis in _AXES
        if stated.get(axis, 0) < 1
    ]
    if problems:
        raise WeightError("\n".join(problems))
    tp, pp, vpp = stated["tp"], stated["pp"], stated["vpp"]
    # Of the ranks of cp and dp each holds the same rows.
    topology = Topology(tp=tp, pp=pp, vpp=vpp, dp=1)
    found, num_shards = sorted(index.layouts), tp * pp
    # The number first: what is stated may be beyond measure.
    if len(found) != num_shards or found != list(range(num_shards)):
        raise WeightError(
            f"{INDEX} holds the shards {', '.join(map(str, found))}; {_words(topology)} ask for "
            f"0 to {num_shards - 1}"
        )
    return topology


def _words(topology: Topology) -> str:
    return f"tp {topology.tp}, pp {topology.pp}, vpp {topology.vpp}"


def _vocab_height(index: Index) -> int:
    """Rows that a shard of the vocabulary has in most places; 0 if none is there."""
    heights = Counter(
        layout.shape[layout.dim]
        for layouts in index.layouts.values()
        for name, layout in layouts.items()
        if name.endswith(_OF_VOCAB)
    )
    return heights.most_common(1)[0][0] if heights else 0


def _differences(
    shard: int, found: Mapping[str, Layout], expected: Mapping[str, Layout]
) -> Iterator[str]:
    for name in expected:
        if name not in found:
            yield f"{name!r} (shard {shard}) is missing"
    for name, layout in found.items():
        if name not in expected:
            yield f"{name!r} (shard {shard}) is not a parameter of this shard"
        elif problem := _difference(layout, expected[name]):
            yield f"{name!r} (shard {shard}) {problem}"


def _difference(found: Layout, expected: Layout) -> str:
    """The first of its rows that are others than they should be; empty if all are right."""
    if (found.shape, found.dim) != (expected.shape, expected.dim):
        return (
            f"has shape {found.shape}, cut along dim {found.dim}; expected {expected.shape}, "
            f"dim {expected.dim}"
        )
    for (start, held), (_, wanted) in zip(_runs(found), _runs(expected), strict=False):
        if held != wanted:
            return f"holds from row {start} on {_rows(held)}, expected {_rows(wanted)}"
    return ""


def _runs(layout: Layout) -> list[tuple[int, Interval]]:
    """Without empty ones: then two of equal length that agree all along are equal."""
    return [(start, interval) for start, interval in layout.located() if interval.length]


def _rows(interval: Interval) -> str:
    if interval.tensor is None:
        return f"{interval.length} rows of padding"
    return f"rows {interval.start}:{interval.stop} of {interval.tensor}"


def _without_tensors(index: Index) -> Iterator[str]:
    """Parameters of which the files hold nothing, although they hold others of that kind."""
    held = {(piece.kind, piece.shard, piece.param) for piece in index.pieces}
    present = {piece.kind for piece in index.pieces}
    for kind in KINDS:
        for shard, layouts in index.layouts.items() if kind in present else ():
            for name in layouts:
                if (kind, shard, name) not in held:
                    yield f"{name!r} (shard {shard}) has no tensor of kind {kind}"

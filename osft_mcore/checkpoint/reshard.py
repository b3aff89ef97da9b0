"""A checkpoint at another layout: weights, optimizer state and all that lies beside them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from osft_mcore import __version__
from osft_mcore.checkpoint.assemble import (
    Watched,
    copy_files,
    has_engine_names,
    layout_problems,
    megatron_shards,
    shard_pieces,
    shard_specs,
    values,
    write_contents,
    write_parts,
)
from osft_mcore.checkpoint.convert import checkpoint_fingerprint, joined, say_broken, say_found
from osft_mcore.checkpoint.dtypes import stored_dtypes, target_dtypes
from osft_mcore.checkpoint.formats import check_rows, format_of, open_checkpoint
from osft_mcore.checkpoint.index import INDEX, KINDS, Index, Kind, to_json
from osft_mcore.checkpoint.manifest import read_details, read_manifest
from osft_mcore.checkpoint.save import Part, part_name
from osft_mcore.checkpoint.source import CheckpointSource, read_index
from osft_mcore.checkpoint.staging import staging, target_problems
from osft_mcore.config.model_shape import ModelShape
from osft_mcore.errors import ConfigError, OsftError
from osft_mcore.files import json_bytes
from osft_mcore.log.console import Console
from osft_mcore.parallel.topology import Topology
from osft_mcore.weights.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """All tensors of one kind, before they are written."""

    kind: Kind
    source: Watched
    dtypes: Mapping[int, Mapping[str, torch.dtype]]
    """Shard -> parameter -> dtype."""


def reshard(
    mcore: Path,
    out: Path,
    *,
    topology: Topology,
    vocab_multiple: int,
    hashes: bool,
    console: Console,
) -> None:
    """Write the checkpoint `mcore`, of this package's format, at `topology` (dp 1).

    A training checkpoint stays one: a run can go on from it. `hashes`: hold every file against the
    manifest first. Raises OsftError with all that is wrong; then nothing is written, or what is
    complete stays in OUT.tmp for the same call to go on from.
    """
    problems = target_problems(out)
    try:
        shape, index = _opened(mcore, hashes=hashes)
        others = _other_files(mcore, index)
        problems += layout_problems(shape, topology, vocab_multiple)
        shards: dict[int, Mapping[str, Layout]] = {}
        if not problems:
            engine = has_engine_names(index.layouts)
            shards = megatron_shards(
                shape, topology, vocab_multiple=vocab_multiple, transformer_engine=engine
            )
        present = {piece.kind for piece in index.pieces}
        kinds = [_tensors(mcore, index, k, shape, shards) for k in KINDS if k in present]
    except OsftError as error:
        raise joined(problems, error, option="--mcore") from None
    if problems:
        raise ConfigError(problems)
    job = {
        "conversion": "reshard",
        "source": checkpoint_fingerprint(mcore),
        "version": __version__,
        **topology.actor_sizes(),
        "vocab_multiple": vocab_multiple,
    }
    with staging(out, job) as opened:
        say_found(opened.found, console)
        parts = [_part(shard, layouts, kinds) for shard, layouts in shards.items()]
        write_parts(opened, parts, console)
        pieces = tuple(
            piece
            for tensors in kinds
            for shard, layouts in shards.items()
            for piece in shard_pieces(shard, tensors.kind, layouts)
        )
        resharded = Index(topology=topology.actor_sizes(), layouts=shards, pieces=pieces)
        copy_files(opened, mcore, others)
        write_contents(opened, {INDEX: json_bytes(to_json(resharded))})
        opened.publish({**read_details(mcore), "resharded_from": str(mcore.resolve())})
    console.say(f"kinds of tensors: {', '.join(tensors.kind for tensors in kinds)}")
    console.say(f"carried along: {', '.join(others)}")
    say_broken(_broken(kinds), opened.found, console)


def _opened(mcore: Path, *, hashes: bool) -> tuple[ModelShape, Index]:
    found = open_checkpoint(mcore, hf_config=None, hashes=hashes)
    if format_of(mcore) == "torch_dist":
        raise ConfigError(f"--mcore: {mcore} is a torch_dist checkpoint, which has no layout")
    return found.shape, read_index(mcore)


def _other_files(mcore: Path, index: Index) -> list[str]:
    """What lies beside tensors and index."""
    tensors = {piece.file for piece in index.pieces}
    return sorted(read_manifest(mcore).keys() - tensors - {INDEX})


def _tensors(
    folder: Path,
    index: Index,
    kind: Kind,
    shape: ModelShape,
    shards: Mapping[int, Mapping[str, Layout]],
) -> Tensors:
    """All of one kind. Raises WeightError unless every row of the model is there."""
    source = CheckpointSource(folder, index, kind)
    check_rows(source, shape, f"{folder}: {kind}")
    dtypes = target_dtypes(shards, stored_dtypes(source), None)
    return Tensors(kind=kind, source=Watched(source, shape, None), dtypes=dtypes)


def _broken(kinds: Sequence[Tensors]) -> list[str]:
    """What NaN or infinite values were read of."""
    return [f"{tensors.kind} {name}" for tensors in kinds for name in tensors.source.broken]


def _part(shard: int, layouts: Mapping[str, Layout], kinds: Sequence[Tensors]) -> Part:
    """All kinds of one shard, in one file."""
    specs = [
        spec
        for each in kinds
        for spec in shard_specs(shard, each.kind, layouts, each.dtypes[shard])
    ]

    def tensors() -> Iterator[Tensor]:
        for each in kinds:
            yield from values(layouts, each.dtypes[shard], each.source)

    return Part(file=part_name(shard), specs=specs, tensors=tensors)

"""The files of a checkpoint at a layout of one's choice, and how they get into a new folder."""

import itertools
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from osft_mcore.checkpoint.index import Kind, Piece
from osft_mcore.checkpoint.save import Part, part_name, readable
from osft_mcore.checkpoint.staging import Staging
from osft_mcore.checkpoint.torch_dist_keys import boxes_of_shard
from osft_mcore.checkpoint.torch_dist_metadata import METADATA
from osft_mcore.checkpoint.torch_dist_writer import write_torch_dist
from osft_mcore.config.divide import tensor_parallel_problems
from osft_mcore.config.model_shape import ModelShape, padded_vocab
from osft_mcore.errors import CheckpointError
from osft_mcore.files import READ_BYTES, FileRecord, record_of, rename, write_file
from osft_mcore.log.console import Console, StepProgress
from osft_mcore.parallel.topology import Topology
from osft_mcore.weights.fill import filled
from osft_mcore.weights.finite import all_finite
from osft_mcore.weights.layout import Layout, Layouts
from osft_mcore.weights.params import hf_tensors, megatron_layouts
from osft_mcore.weights.plan import Copy
from osft_mcore.weights.safetensors_stream import TensorSpec, Values, write_safetensors
from osft_mcore.weights.source import WeightSource

LINES: Final = 10
"""Progress lines of one conversion where there is no terminal."""
_FUSED_NORM: Final = "layer_norm_weight"
"""In names of parameters of Transformer Engine's layers."""


class Watched:
    """A `WeightSource` that remembers which tensors are not finite, as they pass."""

    def __init__(self, source: WeightSource, shape: ModelShape, target: torch.dtype | None) -> None:
        """`target`: the dtype that values are to have, which may not hold them; None: as read."""
        self.shape, self.target = shape, target
        self._source = source
        self._tensors = hf_tensors(shape)
        self._broken: dict[str, None] = {}

    @property
    def broken(self) -> list[str]:
        """What NaN or infinite values were read of, each once: Hugging Face tensors, or, where none
        are at either end, parameters.
        """
        return list(self._broken)

    @property
    def layouts(self) -> Layouts:
        """See `WeightSource`."""
        return self._source.layouts

    def dtype(self, shard: int, param: str) -> torch.dtype:
        """See `WeightSource`."""
        return self._source.dtype(shard, param)

    def rows(self, copy: Copy) -> Tensor:
        """See `WeightSource`."""
        rows = self._source.rows(copy)
        # At one end of most conversions are Hugging Face tensors.
        name = copy.src_param if copy.src_param in self._tensors else copy.dst_param
        if name not in self._broken:
            written = rows if self.target is None else rows.to(self.target)
            if not all_finite([written]):
                self._broken[name] = None
        return rows


def layout_problems(shape: ModelShape, topology: Topology, vocab_multiple: int) -> list[str]:
    """Why the model cannot be laid out so, in words of the tools' options."""
    sizes = {
        "--tp": topology.tp,
        "--pp": topology.pp,
        "--vpp": topology.vpp,
        "--vocab-multiple": vocab_multiple,
    }
    small = [
        f"{name}: found {size}, expected 1 or more" for name, size in sizes.items() if size < 1
    ]
    if small:
        return small
    problems = [
        "--tp" + problem.removeprefix("parallel.tp")
        for problem in tensor_parallel_problems("parallel.tp", topology.tp, shape)
    ]
    if topology.vpp > 1 and topology.pp == 1:
        problems.append(f"--vpp: {topology.vpp} chunks a stage need more than one stage (--pp)")
    if topology.pp * topology.vpp > shape.num_layers:
        problems.append(
            f"--pp: pp * vpp = {topology.pp} * {topology.vpp} = {topology.pp * topology.vpp} model "
            f"chunks, but the model has only {shape.num_layers} layers"
        )
    return problems


def megatron_shards(
    shape: ModelShape, topology: Topology, *, vocab_multiple: int, transformer_engine: bool
) -> dict[int, Mapping[str, Layout]]:
    """Layouts of all shards (pp_rank * tp + tp_rank) of a Megatron-Core model."""
    return {
        pp_rank * topology.tp + tp_rank: megatron_layouts(
            shape,
            tp=topology.tp,
            tp_rank=tp_rank,
            pp=topology.pp,
            pp_rank=pp_rank,
            vpp=topology.vpp,
            vocab_padded=padded_vocab(shape.vocab, multiple=vocab_multiple, tp=topology.tp),
            transformer_engine=transformer_engine,
        )
        for pp_rank in range(topology.pp)
        for tp_rank in range(topology.tp)
    }


def has_engine_names(layouts: Layouts) -> bool:
    """True if parameters are named as in Transformer Engine's layers; an index does not say it."""
    return any(_FUSED_NORM in name for at in layouts.values() for name in at)


def shard_pieces(shard: int, kind: Kind, layouts: Mapping[str, Layout]) -> list[Piece]:
    """Every parameter of one shard whole, in the shard's file."""
    return [
        Piece(
            file=part_name(shard),
            kind=kind,
            shard=shard,
            param=param,
            start=0,
            stop=layout.shape[layout.dim] * layout.row_elements,
        )
        for param, layout in layouts.items()
    ]


def shard_specs(
    shard: int, kind: Kind, layouts: Mapping[str, Layout], dtypes: Mapping[str, torch.dtype]
) -> list[TensorSpec]:
    """The tensors of `shard_pieces`."""
    return [
        TensorSpec(f"{kind}/{shard}/{param}", dtypes[param], layout.shape)
        for param, layout in layouts.items()
    ]


def values(
    layouts: Mapping[str, Layout], dtypes: Mapping[str, torch.dtype], source: WeightSource
) -> Iterator[Tensor]:
    """The parameters of `layouts`, read from `source` one by one."""
    return (
        tensor
        for _, tensor in filled(layouts, source.layouts, source.rows, dtype=dtypes.__getitem__)
    )


def write_parts(opened: Staging, parts: Sequence[Part], console: Console) -> None:
    """Write the tensor files that are not there yet, with progress.

    Raises CheckpointError before anything is written if the disk has no room for them.
    """
    missing = [part for part in parts if part.file not in opened.done]
    _check_room(opened.folder, sum(spec.num_bytes for part in missing for spec in part.specs))
    total = sum(len(part.specs) for part in parts)
    done = total - sum(len(part.specs) for part in missing)
    every = max(1, total // LINES)
    with console.steps("tensors", total, every=every, done=done) as progress:
        for part in missing:
            opened.write(part.file, partial(_write_part, part, progress, done))
            done += len(part.specs)


def write_as_torch_dist(
    opened: Staging,
    source: Watched,
    topology: Topology,
    *,
    vocab_multiple: int,
    console: Console,
) -> None:
    """Write the model in Megatron-Core's own format; what is not complete is begun anew.

    `source` holds Hugging Face tensors. Raises WeightError if the model does not fit.
    """
    if METADATA in opened.done:
        return
    vocab_padded = padded_vocab(source.shape.vocab, multiple=vocab_multiple, tp=topology.tp)
    total = sum(
        len(
            boxes_of_shard(
                source.shape,
                tp=topology.tp,
                tp_rank=tp_rank,
                pp=topology.pp,
                pp_rank=pp_rank,
                vocab_padded=vocab_padded,
            )
        )
        for pp_rank in range(topology.pp)
        for tp_rank in range(topology.tp)
    )
    numbers = itertools.count(1)
    num_bytes = sum(
        math.prod(at.shape) * (source.target or source.dtype(0, name)).itemsize
        for name, at in source.layouts[0].items()
    )
    _check_room(opened.folder, num_bytes)
    parts = opened.folder / "parts"
    parts.mkdir()
    with console.steps("tensors", total, every=max(1, total // LINES)) as progress:
        names = write_torch_dist(
            parts,
            source,
            source.shape,
            tp=topology.tp,
            pp=topology.pp,
            vocab_multiple=vocab_multiple,
            dtype=source.target,
            transformer_engine=True,
            note=lambda _key, _bytes: progress.finished(next(numbers), {}),
        )
    for name in names:
        opened.write(name, partial(_moved, parts / name), receipt=False)
    shutil.rmtree(parts)


def write_contents(opened: Staging, contents: Mapping[str, bytes]) -> None:
    """Write small files, by path within the folder."""
    for name, content in contents.items():
        opened.write(name, partial(write_file, chunks=[content]), receipt=False)


def copy_files(opened: Staging, source: Path, names: Iterable[str]) -> None:
    """Copy files of another checkpoint as they are."""
    for name in names:
        chunks = _chunks(source / name)
        opened.write(name, partial(write_file, chunks=chunks), receipt=False)


def _moved(source: Path, target: Path) -> FileRecord:
    rename(source, target)
    return record_of(target)


def _write_part(part: Part, progress: StepProgress, done: int, path: Path) -> FileRecord:
    def counted() -> Iterator[Values]:
        for number, values in enumerate(part.tensors(), done + 1):
            yield values
            progress.finished(number, {})

    return write_safetensors(path, part.specs, counted())


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            yield chunk


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: {readable(needed)} are still to be written, but {readable(free)} are free; "
            "make room or choose another --out"
        )

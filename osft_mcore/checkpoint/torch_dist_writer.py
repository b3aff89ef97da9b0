"""Writes a model as one of Megatron-Core's own checkpoints, the format torch_dist."""

import io
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from osft_mcore.checkpoint.dtypes import stored_dtypes, target_dtypes
from osft_mcore.checkpoint.torch_dist_keys import Box, boxes_of_shard, state_keys
from osft_mcore.checkpoint.torch_dist_reader import BACKEND, CONFIG
from osft_mcore.config.model_shape import ModelShape, padded_vocab
from osft_mcore.errors import WeightError
from osft_mcore.files import flush, json_bytes, write_file
from osft_mcore.weights.fill import filled
from osft_mcore.weights.plan import make_plan
from osft_mcore.weights.source import WeightSource

COMMON: Final = "common.pt"
"""Megatron-Core's file for what is not sharded."""


def write_torch_dist(
    folder: Path,
    source: WeightSource,
    shape: ModelShape,
    *,
    tp: int,
    pp: int,
    vocab_multiple: int,
    dtype: torch.dtype | None,
    transformer_engine: bool,
    note: Callable[[str, int], None],
) -> list[str]:
    """Write the model of `source` into a new `folder`; returns the names of its files.

    There is one .distcp file for each (tp, pp) shard; Megatron-Core loads them in any layout.
    `dtype` None keeps the source's. `transformer_engine`: models of Transformer Engine layers can
    load it as well; without, it holds exactly what the local spec asks for. `note` gets the key and
    the bytes of each part that is written. One parameter is in memory at a time; all files are
    flushed. Raises WeightError if the source lacks rows, a tensor would have several dtypes, or the
    model does not divide.
    """
    # Before anything is written: are all rows there?
    shards, dtypes = planned(
        source, shape, tp=tp, pp=pp, vocab_multiple=vocab_multiple, dtype=dtype
    )
    results: list[WriteResult] = []
    for shard, boxes in shards.items():
        objects = state_keys(shape, transformer_engine=transformer_engine) if shard == 0 else []
        path = folder / f"__{shard}_0.distcp"
        results += _write_shard(path, boxes, source, dtypes, objects, note)
    _write_common(folder / COMMON)
    _Writer(folder).finish(_metadata(shards, dtypes, results), [results])
    # Last: Megatron-Core takes a folder with this file for a checkpoint.
    write_file(folder / CONFIG, [json_bytes(_CONFIG)])
    flush(folder)
    return sorted(path.name for path in folder.iterdir())


def planned(
    source: WeightSource,
    shape: ModelShape,
    *,
    tp: int,
    pp: int,
    vocab_multiple: int,
    dtype: torch.dtype | None,
) -> tuple[dict[int, Mapping[str, Box]], dict[str, torch.dtype]]:
    """The parameters of every shard, and the dtype of every tensor of the checkpoint, by key.

    Raises WeightError as `write_torch_dist`.
    """
    vocab_padded = padded_vocab(shape.vocab, multiple=vocab_multiple, tp=tp)
    shards: dict[int, Mapping[str, Box]] = {
        pp_rank * tp + tp_rank: boxes_of_shard(
            shape, tp=tp, tp_rank=tp_rank, pp=pp, pp_rank=pp_rank, vocab_padded=vocab_padded
        )
        for pp_rank in range(pp)
        for tp_rank in range(tp)
    }
    layouts = {
        shard: {name: box.layout for name, box in boxes.items()} for shard, boxes in shards.items()
    }
    make_plan(source.layouts, layouts)
    return shards, _dtypes(shards, target_dtypes(layouts, stored_dtypes(source), dtype))


_Boxes = Mapping[str, Box]
_CONFIG: Final = {
    "sharded_backend": BACKEND,
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class _Writer(FileSystemWriter):
    """torch's writer of `.metadata`, without the name of the folder and a random number in it.

    Its `write_data` is of no use: it keeps all tensors of a file until that file is complete.
    """

    def storage_meta(self) -> None:
        """Nothing: equal weights give equal files."""


def _write_shard(
    path: Path,
    boxes: _Boxes,
    source: WeightSource,
    dtypes: Mapping[str, torch.dtype],
    objects: Iterable[str],
    note: Callable[[str, int], None],
) -> list[WriteResult]:
    layouts = {name: box.layout for name, box in boxes.items()}

    def dtype(name: str) -> torch.dtype:
        return dtypes[boxes[name].key]

    results = []
    with path.open("wb") as file:
        # What Megatron-Core saves for a linear layer that has no FP8 state, each in a list.
        results += [_append(file, path.name, MetadataIndex(key), [None]) for key in objects]
        for name, param in filled(layouts, source.layouts, source.rows, dtype=dtype):
            box = boxes[name]
            index = MetadataIndex(box.key, box.offsets)
            results.append(_append(file, path.name, index, param.reshape(box.sizes)))
            note(box.key, param.numel() * param.element_size())
            # Or it would be there until the next one is complete.
            del param
        file.flush()
        os.fsync(file.fileno())
    return results


def _append(file: BinaryIO, name: str, index: MetadataIndex, value: Any) -> WriteResult:
    start = file.tell()
    torch.save(value, file)
    length = file.tell() - start
    place = _StorageInfo(relative_path=name, offset=start, length=length)
    return WriteResult(index=index, size_in_bytes=length, storage_data=place)


def _metadata(
    shards: Mapping[int, _Boxes],
    dtypes: Mapping[str, torch.dtype],
    results: Iterable[WriteResult],
) -> Metadata:
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for boxes in shards.values():
        for box in boxes.values():
            tensor = entries.setdefault(
                box.key,
                TensorStorageMetadata(
                    properties=TensorProperties(dtype=dtypes[box.key]),
                    size=torch.Size(box.shape),
                    chunks=[],
                ),
            )
            assert isinstance(tensor, TensorStorageMetadata), "only tensors are entered here"
            tensor.chunks.append(
                ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))
            )
    for result in results:
        entries.setdefault(result.index.fqn, BytesStorageMetadata())
    return Metadata(state_dict_metadata=entries)


def _dtypes(
    shards: Mapping[int, _Boxes], of_params: Mapping[int, Mapping[str, torch.dtype]]
) -> dict[str, torch.dtype]:
    """The dtype of every tensor of the checkpoint, by key."""
    found: dict[str, set[torch.dtype]] = {}
    for shard, dtypes in of_params.items():
        for name, dtype in dtypes.items():
            found.setdefault(shards[shard][name].key, set()).add(dtype)
    mixed = {key: several for key, several in found.items() if len(several) > 1}
    if mixed:
        lines = [
            f"{key} is one tensor for all layers, which are {', '.join(sorted(map(str, several)))}"
            for key, several in mixed.items()
        ]
        raise WeightError("\n".join([*lines, "give one dtype for all parameters (--dtype)"]))
    return {key: next(iter(several)) for key, several in found.items()}


def _write_common(path: Path) -> None:
    """What Megatron-LM reads of a checkpoint without a training state."""
    content = io.BytesIO()
    common = {
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"non_homogeneous_layers": False, "singleton_local_shards": False},
    }
    torch.save(common, content)
    write_file(path, [content.getbuffer()])

"""Writes Hugging Face safetensors folders tensor by tensor: no file is ever held in memory."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osft_mcore.config.model_shape import ModelShape
from osft_mcore.errors import WeightError
from osft_mcore.files import FileRecord, flush, json_bytes, rename, write_file
from osft_mcore.weights.params import hf_tensors
from osft_mcore.weights.safetensors_io import INDEX, SINGLE
from osft_mcore.weights.safetensors_stream import TensorSpec, write_safetensors


@dataclass(frozen=True, slots=True, kw_only=True)
class HfFile:
    """One weight file of a folder, before it is written."""

    name: str
    specs: tuple[TensorSpec, ...]


def hf_files(
    shape: ModelShape, dtypes: Mapping[str, torch.dtype], *, max_shard_bytes: int
) -> list[HfFile]:
    """The weight files of a model, in the order of `hf_tensors`; none over `max_shard_bytes`
    unless it holds a single tensor."""
    shards: list[list[TensorSpec]] = []
    size = 0
    for name, tensor_shape in hf_tensors(shape).items():
        spec = TensorSpec(name, dtypes[name], tensor_shape)
        if not shards or size + spec.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    if len(shards) == 1:
        return [HfFile(name=SINGLE, specs=tuple(shards[0]))]
    return [
        HfFile(name=f"model-{number:05d}-of-{len(shards):05d}.safetensors", specs=tuple(specs))
        for number, specs in enumerate(shards, 1)
    ]


def hf_index(files: Iterable[HfFile]) -> dict[str, Any]:
    """What model.safetensors.index.json says about several files."""
    specs = {spec: file.name for file in files for spec in file.specs}
    return {
        "metadata": {"total_size": sum(spec.num_bytes for spec in specs)},
        "weight_map": {spec.name: specs[spec] for spec in sorted(specs, key=lambda at: at.name)},
    }


def save_hf(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    shape: ModelShape,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> dict[str, FileRecord]:
    """Write safetensors files, with an index if there are several, and say what each holds.

    Call on one rank. Takes tensors in the order of `hf_tensors` and writes each as it comes, so a
    generator may reuse its buffer. Files get their names only once all are complete, the index
    last: a folder that was interrupted does not load. Raises WeightError if a tensor is missing,
    unknown, out of order, of the wrong shape or dtype; then nothing of it is left and earlier
    weights are untouched.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = hf_files(
        shape, dict.fromkeys(hf_tensors(shape), dtype), max_shard_bytes=max_shard_bytes
    )
    stream = iter(tensors)
    try:
        records = {
            file.name: write_safetensors(
                _temporary(folder, file), file.specs, _expected(file, stream)
            )
            for file in files
        }
        if (extra := next(stream, None)) is not None:
            raise WeightError(f"tensor {extra[0]!r} came, which the model does not have, or twice")
        return _publish(folder, files, records)
    finally:
        for file in files:
            with suppress(FileNotFoundError):
                _temporary(folder, file).unlink()


def _expected(file: HfFile, stream: Iterator[tuple[str, Tensor]]) -> Iterator[Tensor]:
    """The tensors of one file, each under the name that is due."""
    for spec in file.specs:
        name, tensor = next(stream, ("", None))
        if tensor is None:
            raise WeightError(f"no tensor came for {spec.name}, nor for any after it")
        if name != spec.name:
            raise WeightError(f"tensor {name!r} came where {spec.name!r} was due")
        yield tensor


def _temporary(folder: Path, file: HfFile) -> Path:
    # Not *.safetensors: nothing that globs a folder takes it for a weight file.
    return folder / f".{file.name}.incomplete"


def _publish(
    folder: Path, files: list[HfFile], records: dict[str, FileRecord]
) -> dict[str, FileRecord]:
    """Give complete files their names; what was there before goes first."""
    for old in (folder / INDEX, folder / SINGLE, *folder.glob("model-*-of-*.safetensors")):
        old.unlink(missing_ok=True)
    for file in files:
        rename(_temporary(folder, file), folder / file.name)
    if len(files) > 1:
        temporary = folder / f".{INDEX}.incomplete"
        records = {**records, INDEX: write_file(temporary, [json_bytes(hf_index(files))])}
        rename(temporary, folder / INDEX)
    flush(folder)
    return records

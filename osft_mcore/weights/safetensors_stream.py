"""Writes a safetensors file tensor by tensor: the library wants all of them in memory at once."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final, TypeAlias

import torch
from torch import Tensor

from osft_mcore.errors import WeightError
from osft_mcore.files import FileRecord, write_file

DTYPE_NAMES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}
"""The format's names of the dtypes that this package writes."""
_ALIGNMENT: Final = 8

Values: TypeAlias = Tensor | Iterable[memoryview]
"""Of one tensor: as a whole, or its bytes piece by piece, each good until the next is asked for."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a file before its values are known."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[Values],
    *,
    metadata: Mapping[str, str] | None = None,
) -> FileRecord:
    """Write a new file with `specs`, whose values `tensors` come in the same order, one at a time.

    The file is flushed to the disk. Raises WeightError if a tensor is not as announced, OSError if
    it cannot be written; then an incomplete file is left. Format:
    huggingface.co/docs/safetensors (8 bytes of length, a JSON header, the values).
    """
    return write_file(path, _chunks(specs, tensors, metadata or {"format": "pt"}))


def header_bytes(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """What stands before the values."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for spec in specs:
        start, end = end, end + spec.num_bytes
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: Tensor) -> memoryview:
    """The values of a contiguous CPU tensor, without a copy."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _chunks(
    specs: Sequence[TensorSpec], tensors: Iterable[Values], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    yield header_bytes(specs, metadata)
    for spec, values in zip(specs, tensors, strict=True):
        if not isinstance(values, Tensor):
            yield from _counted(spec, values)
            continue
        if (values.dtype, tuple(values.shape)) != (spec.dtype, spec.shape):
            raise WeightError(
                f"tensor {spec.name!r} is {values.dtype} of shape {tuple(values.shape)}, announced "
                f"as {spec.dtype} of shape {spec.shape}"
            )
        yield bytes_of(values.cpu())


def _counted(spec: TensorSpec, pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    num_bytes = 0
    for piece in pieces:
        yield piece
        num_bytes += len(piece)
    if num_bytes != spec.num_bytes:
        raise WeightError(
            f"tensor {spec.name!r} has {num_bytes} bytes, announced as {spec.dtype} of shape "
            f"{spec.shape}"
        )

"""Reads parts of safetensors files with plain reads.

A mapped file is slower, several times where page faults are dear, and every page that was touched
counts as memory until the file is closed.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from osft_mcore.errors import WeightError

FLOATS: Final = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The dtypes of weights, by the format's names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of a file, as the header describes it."""

    name: str
    dtype: str
    """The format's name; `FLOATS` has those that can be read."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte, in the file."""


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name. Raises WeightError if it is not complete."""
    try:
        # The library's own checks: of the header, and that the values fill the rest of the file.
        with safe_open(path, framework="pt"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise WeightError(f"{path} is not a complete safetensors file: {error}") from error
    return {
        name: StoredTensor(
            name=name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            offset=8 + length + entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def read_elements(path: Path, stored: StoredTensor, start: int, stop: int) -> Tensor:
    """Elements start:stop of the flattened tensor. Raises WeightError if they cannot be read."""
    assert 0 <= start <= stop <= prod(stored.shape), f"{start}:{stop} of {stored}"
    if stored.dtype not in FLOATS:
        raise WeightError(
            f"{path}: {stored.name!r} is {stored.dtype}, expected one of {', '.join(FLOATS)}"
        )
    values = torch.empty(stop - start, dtype=FLOATS[stored.dtype], device="cpu")
    rest: memoryview = values.view(torch.uint8).numpy().data
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(stored.offset + start * values.element_size())
            while rest:
                # One call reads 2 GiB at most.
                num_read = file.readinto(rest)
                if not num_read:
                    raise WeightError(f"{path} ended within {stored.name!r}")
                rest = rest[num_read:]
    except OSError as error:
        raise WeightError(f"{path} cannot be read: {error.strerror}") from error
    return values


def read_rows(path: Path, stored: StoredTensor, start: int, stop: int) -> Tensor:
    """Rows start:stop along the first dim."""
    row = prod(stored.shape[1:])
    values = read_elements(path, stored, start * row, stop * row)
    return values.reshape(stop - start, *stored.shape[1:])

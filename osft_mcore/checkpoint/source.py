"""Reads rows of weights and of optimizer state from a checkpoint's files."""

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from osft_mcore.checkpoint.index import INDEX, Index, Kind, Piece, from_json
from osft_mcore.errors import WeightError
from osft_mcore.weights.layout import Layouts
from osft_mcore.weights.plan import Copy

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def read_index(folder: Path) -> Index:
    """The index of a checkpoint. Raises WeightError if it is missing or damaged."""
    path = folder / INDEX
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")), path)
    except (OSError, ValueError) as error:
        raise WeightError(f"{path} cannot be read: {error}") from error


class CheckpointSource:
    """One kind of tensors of a checkpoint, as a `WeightSource`."""

    def __init__(self, folder: Path, index: Index, kind: Kind = "weight") -> None:
        """Raises WeightError if the kind is not there, or pieces of a parameter are missing."""
        self._folder = folder
        self._pieces = index.of_kind(kind)
        if not self._pieces:
            raise WeightError(f"{folder} holds no tensors of kind {kind!r}")
        self._layouts: Layouts = {
            shard: {name: at for name, at in layouts.items() if (shard, name) in self._pieces}
            for shard, layouts in index.layouts.items()
        }
        self._whole: dict[tuple[int, str], Tensor] = {}

    @property
    def layouts(self) -> Layouts:
        """Of the parameters that are there."""
        return self._layouts

    def dtype(self, shard: int, param: str) -> torch.dtype:
        """As in the file."""
        piece = self._pieces[shard, param][0]
        with _opened(self._folder / piece.file) as file:
            name: str = _slice(file, piece).get_dtype()
        if name not in _DTYPES:
            raise WeightError(f"{self._folder / piece.file}: {piece.tensor!r} is {name}")
        return _DTYPES[name]

    def rows(self, copy: Copy) -> Tensor:
        """See `WeightSource`."""
        shard, param = copy.src_rank, copy.src_param
        shape = self._layouts[shard][param].shape
        if copy.dim == 0:
            row = prod(shape[1:])
            start, stop = copy.src_start * row, (copy.src_start + copy.length) * row
            return self._elements(shard, param, start, stop).reshape(copy.length, *shape[1:])
        # Columns lie all over the file. Whoever asks for some will ask for the rest of them.
        if (shard, param) not in self._whole:
            self._whole.clear()
            flat = self._elements(shard, param, 0, prod(shape))
            self._whole[shard, param] = flat.reshape(shape)
        return self._whole[shard, param].narrow(copy.dim, copy.src_start, copy.length)

    def _elements(self, shard: int, param: str, start: int, stop: int) -> Tensor:
        shape = self._layouts[shard][param].shape
        parts = []
        for piece in self._pieces[shard, param]:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                parts.append(_read(self._folder / piece.file, piece, shape, low, high))
        if not parts:
            return torch.empty(0)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _read(path: Path, piece: Piece, shape: Sequence[int], low: int, high: int) -> Tensor:
    """Elements low:high of the parameter, flat, from the piece that has them."""
    whole = piece.start == 0 and piece.stop == prod(shape)
    # Opened for every read: what a mapping has touched counts as memory until it is closed.
    with _opened(path) as file:
        view = _slice(file, piece)
        expected = list(shape) if whole else [piece.stop - piece.start]
        if view.get_shape() != expected:
            raise WeightError(
                f"{path}: {piece.tensor!r} has shape {view.get_shape()}, the index says {expected}"
            )
        if whole:
            row = prod(shape[1:])
            first, last = low // row, -(-high // row)
            part: Tensor = view[first:last].reshape(-1)[low - first * row : high - first * row]
        else:
            part = view[low - piece.start : high - piece.start]
        return part


def _slice(file: Any, piece: Piece) -> Any:
    try:
        return file.get_slice(piece.tensor)
    except SafetensorError as error:
        raise WeightError(f"{piece.file} holds no {piece.tensor!r}: {error}") from error


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightError(f"{path} is not a complete safetensors file: {error}") from error

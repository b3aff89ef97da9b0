"""Reads rows of weights and of optimizer state from a checkpoint's files."""

from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from osft_mcore.checkpoint.index import INDEX, Index, Kind, Piece, from_json
from osft_mcore.errors import WeightError
from osft_mcore.files import parse_json
from osft_mcore.weights.layout import Layout, Layouts
from osft_mcore.weights.plan import Copy
from osft_mcore.weights.safetensors_read import FLOATS, StoredTensor, read_elements, read_header


def read_index(folder: Path) -> Index:
    """The index of a checkpoint. Raises WeightError if it is missing or damaged."""
    path = folder / INDEX
    try:
        return from_json(parse_json(path.read_bytes()), path)
    except (OSError, ValueError) as error:
        raise WeightError(f"{path} cannot be read: {error}") from error


def shape_of(piece: Piece, layouts: Mapping[str, Layout]) -> tuple[int, ...]:
    """A piece's shape in its file; `layouts` are those of its shard."""
    shape = layouts[piece.param].shape
    num_elements = piece.stop - piece.start
    return shape if num_elements == prod(shape) else (num_elements,)


def checkpoint_weights(folder: Path) -> "CheckpointSource":
    """The weights of a checkpoint. Raises WeightError if its index or a parameter is damaged."""
    return CheckpointSource(folder, read_index(folder))


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
        self._headers: dict[Path, dict[str, StoredTensor]] = {}
        self._whole: dict[tuple[int, str], Tensor] = {}

    @property
    def layouts(self) -> Layouts:
        """Of the parameters that are there."""
        return self._layouts

    def dtype(self, shard: int, param: str) -> torch.dtype:
        """As in the file."""
        piece = self._pieces[shard, param][0]
        name = self._stored(piece).dtype
        if name not in FLOATS:
            raise WeightError(f"{self._folder / piece.file}: {piece.tensor!r} is {name}")
        return FLOATS[name]

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
        parts = []
        for piece in self._pieces[shard, param]:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                path, first = self._folder / piece.file, piece.start
                parts.append(read_elements(path, self._stored(piece), low - first, high - first))
        if not parts:
            return torch.empty(0)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _stored(self, piece: Piece) -> StoredTensor:
        """A piece as its file's header describes it."""
        path = self._folder / piece.file
        if path not in self._headers:
            self._headers[path] = read_header(path)
        stored = self._headers[path].get(piece.tensor)
        if stored is None:
            raise WeightError(f"{path} holds no {piece.tensor!r}")
        if stored.shape != (expected := shape_of(piece, self._layouts[piece.shard])):
            raise WeightError(
                f"{path}: {piece.tensor!r} has shape {stored.shape}, the index says {expected}"
            )
        return stored

"""Reads rows of weights from Megatron-Core's own checkpoints, the format torch_dist."""

import io
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from osft_mcore.checkpoint.torch_dist_keys import IGNORED, Home, find_homes
from osft_mcore.checkpoint.torch_dist_metadata import METADATA, Chunk, StoredTensor, read_metadata
from osft_mcore.config.model_shape import ModelShape
from osft_mcore.errors import WeightError
from osft_mcore.files import parse_json
from osft_mcore.weights.layout import Layouts
from osft_mcore.weights.plan import Copy

TRACKER: Final = "latest_checkpointed_iteration.txt"
"""Megatron-LM's file beside its checkpoints that names the latest."""
CONFIG: Final = "metadata.json"
BACKEND: Final = "torch_dist"

_DTYPES: Final = MappingProxyType(
    {
        "float64": torch.float64,
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
    }
)

_ZIP: Final = b"PK\x03\x04"


def torch_dist_folder(folder: Path) -> Path:
    """The checkpoint itself: `folder`, or the one that Megatron-LM's tracker file in it names.

    Raises WeightError if there is neither, or if the checkpoint is of another format.
    """
    tracker = folder / TRACKER
    if not (folder / METADATA).is_file() and tracker.is_file():
        latest = tracker.read_text(encoding="utf-8", errors="replace")[:100].strip()
        if latest != "release" and not re.fullmatch(r"[0-9]{1,18}", latest):
            raise WeightError(f"{tracker}: found {latest!r}, expected a number or 'release'")
        folder = folder / (latest if latest == "release" else f"iter_{int(latest):07d}")
    if not (folder / METADATA).is_file():
        raise WeightError(
            f"{folder}: no {METADATA} is there; expected a folder that Megatron-Core wrote in the "
            f"format {BACKEND}, such as iter_0000100, or one with a {TRACKER}"
        )
    if (folder / CONFIG).is_file():
        try:
            backend = parse_json((folder / CONFIG).read_bytes())["sharded_backend"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightError(f"{folder / CONFIG} cannot be read: {error!r}") from error
        if backend != BACKEND:
            raise WeightError(f"{folder / CONFIG}: found format {backend!r}, expected {BACKEND!r}")
    return folder


class TorchDistSource:
    """The model of a torch_dist checkpoint as a `WeightSource` of one shard."""

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        """Read `.metadata`; optimizer state and what is not a tensor are passed over.

        Raises WeightError with every parameter that is missing, unknown, of another shape or dtype,
        or not in the files. Nothing in the files is run or imported.
        """
        self._folder = torch_dist_folder(Path(folder))
        stored = read_metadata(self._folder, IGNORED)
        self._homes, problems = find_homes(stored, shape)
        keys = dict.fromkeys(home.key for home in self._homes.values())
        self._tensors = {key: stored.tensors[key] for key in keys}
        problems += _unreadable(self._folder, self._tensors)
        if problems:
            raise WeightError("\n".join(f"{self._folder}: {problem}" for problem in problems))
        self._last: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    @property
    def layouts(self) -> Layouts:
        """Of shard 0, which has all parameters."""
        return {0: {name: home.layout for name, home in self._homes.items()}}

    def dtype(self, shard: int, param: str) -> torch.dtype:
        """As in the file."""
        assert shard == 0, f"a torch_dist checkpoint has no shard {shard}"
        return _DTYPES[self._tensors[self._homes[param].key].dtype]

    def rows(self, copy: Copy) -> Tensor:
        """See `WeightSource`. Holds one chunk of the checkpoint at a time."""
        home = self._homes[copy.src_param]
        wanted = _box(home, copy)
        overlaps = [
            (chunk, overlap)
            for chunk in self._tensors[home.key].chunks
            if (overlap := _overlap(chunk, wanted))
        ]
        if len(overlaps) == 1:
            chunk, overlap = overlaps[0]
            rows = _part(self._chunk(home.key, chunk), overlap, chunk.offsets)
        else:
            size = [stop - start for start, stop in wanted]
            rows = torch.empty(size, dtype=self.dtype(0, copy.src_param))
            origin = [start for start, _stop in wanted]
            for chunk, overlap in overlaps:
                target = _part(rows, overlap, origin)
                target.copy_(_part(self._chunk(home.key, chunk), overlap, chunk.offsets))
        return rows if home.layer is None else rows[0]

    def _chunk(self, key: str, chunk: Chunk) -> Tensor:
        if (key, chunk.offsets) not in self._last:
            # Before the next is read: only one is ever in memory.
            self._last.clear()
            dtype = _DTYPES[self._tensors[key].dtype]
            self._last[key, chunk.offsets] = _load(self._folder, key, chunk, dtype)
        return self._last[key, chunk.offsets]


Box = Sequence[tuple[int, int]]
"""Start and stop along each dim."""


def _box(home: Home, copy: Copy) -> Box:
    """The part of the stored tensor that a copy takes."""
    box = [(0, size) for size in home.layout.shape]
    box[copy.dim] = (copy.src_start, copy.src_start + copy.length)
    return box if home.layer is None else [(home.layer, home.layer + 1), *box]


def _overlap(chunk: Chunk, box: Box) -> Box | None:
    overlap = [
        (max(low, start), min(low + size, stop))
        for low, size, (start, stop) in zip(chunk.offsets, chunk.sizes, box, strict=True)
    ]
    return overlap if all(start < stop for start, stop in overlap) else None


def _part(tensor: Tensor, box: Box, origin: Sequence[int]) -> Tensor:
    """The view of `box` of a tensor whose first element is at `origin`."""
    for dim, ((start, stop), first) in enumerate(zip(box, origin, strict=True)):
        tensor = tensor.narrow(dim, start - first, stop - start)
    return tensor


def _unreadable(folder: Path, tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Tensors of dtypes that are not weights, and chunks that are not in the files."""
    ends: dict[str, int] = {}
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            yield f"{key} is {tensor.dtype}, expected one of {', '.join(_DTYPES)}"
            continue
        for chunk in tensor.chunks:
            ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
            if chunk.length < prod(chunk.sizes) * _DTYPES[tensor.dtype].itemsize:
                yield f"{key} has a chunk of {chunk.sizes} in {chunk.length} bytes of {chunk.file}"
    for file, end in ends.items():
        path = folder / file
        if not path.is_file():
            yield f"{METADATA} names {file}, which is not there"
        elif path.stat().st_size < end:
            yield f"{file} has {path.stat().st_size} bytes, {METADATA} asks for {end}: cut short"


def _load(folder: Path, key: str, chunk: Chunk, dtype: torch.dtype) -> Tensor:
    path = folder / chunk.file
    where = f"{path}: bytes {chunk.start}:{chunk.start + chunk.length}, a chunk of {key},"
    try:
        with path.open("rb") as file:
            part: Any = _Slice(file, chunk.start, chunk.length)
            if part.read(len(_ZIP)) != _ZIP:
                raise ValueError("it is not of the format that torch.save writes")
            _check_sums(part, chunk.length)
            part.seek(0)
            tensor = torch.load(part, map_location="cpu", weights_only=True)
    except Exception as error:
        # Whatever a damaged or hostile file makes of the reader; weights_only ran nothing of it.
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise WeightError(f"{where} cannot be read as a tensor: {reason}") from error
    if type(tensor) is not Tensor or tensor.dtype != dtype or tensor.shape != chunk.sizes:
        raise WeightError(f"{where} are not a tensor of shape {chunk.sizes} and dtype {dtype}")
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise WeightError(f"{where} are not a plain tensor")
    return tensor


def _check_sums(part: Any, length: int) -> None:
    """Raise ValueError if a byte of an archive is not as it was written; torch.load looks at none.

    Where torch was told to leave the sums out, all of them are zero.
    """
    with zipfile.ZipFile(part) as archive:
        members = archive.infolist()
        stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        if not stored or sum(member.file_size for member in members) > length:
            raise ValueError("it is not of the format that torch.save writes")
        if any(member.CRC for member in members) and (name := archive.testzip()):
            raise ValueError(f"its {name} was changed or damaged: the CRC is another")


class _Slice(io.RawIOBase):
    """Some bytes of a file as a file of its own, which is what torch.load wants."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Bytes from the start of the slice."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, within the slice."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = min(max(origin + offset, 0), self._length)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as the slice goes."""
        part = memoryview(buffer)[: self._length - self._at]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(part)  # type: ignore[attr-defined]
        self._at += count
        return int(count)

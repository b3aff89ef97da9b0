"""What a torch_dist checkpoint holds, from its `.metadata`: tensors, and the chunks of each."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeGuard

from osft_mcore.checkpoint.pickled import Name, Record, read_pickled
from osft_mcore.errors import WeightError

METADATA: Final = ".metadata"
MAX_BYTES: Final = 1 << 26
"""Of `.metadata`: a 70B model with its optimizer needs about a tenth."""
MAX_CHUNKS: Final = 1 << 13
"""Of one tensor."""
MAX_DIMS: Final = 8

_TORCH: Final = "torch.distributed.checkpoint."
NAMES: Final = MappingProxyType(
    {
        module: frozenset(names.split())
        for module, names in {
            f"{_TORCH}metadata": "Metadata MetadataIndex TensorStorageMetadata StorageMeta "
            "BytesStorageMetadata ChunkStorageMetadata TensorProperties _MEM_FORMAT_ENCODING",
            f"{_TORCH}filesystem": "_StorageInfo _StoragePrefix",
            f"{_TORCH}planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
            "torch": "Size float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 "
            "int64 int32 int16 int8 uint8 bool",
            "torch.serialization": "_get_layout",
            # Earlier releases of torch and of Megatron-Core.
            "torch.distributed._shard.sharded_tensor.metadata": "TensorProperties "
            "MEM_FORMAT_ENCODING",
            "megatron.core.dist_checkpointing.strategies.torch": "MCoreMetadata MCoreSavePlan",
            "pathlib": "PosixPath",
            "pathlib._local": "PosixPath",
        }.items()
    }
)
"""Every name that `.metadata` may mention, by module. None of them is imported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A box of a tensor, and the bytes of a file that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    """Inside the checkpoint's folder."""
    start: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor; its chunks cover it exactly."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What a checkpoint holds, by key."""

    tensors: Mapping[str, StoredTensor]
    objects: frozenset[str]
    """Keys of what is not a tensor."""


def read_metadata(folder: Path, ignored: re.Pattern[str]) -> Stored:
    """The tensors and objects of a torch_dist checkpoint, but for keys that start like `ignored`.

    Raises WeightError if `.metadata` is missing, holds anything that such a file has no use for, or
    if its tensors and chunks do not fit together; all problems of its tensors at once.
    """
    path = folder / METADATA
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MAX_BYTES else b""
    except OSError as error:
        raise WeightError(f"{path} cannot be read: {error}") from error
    if size > MAX_BYTES:
        raise WeightError(f"{path} has {size} bytes; expected at most {MAX_BYTES}")
    try:
        root = _fields(read_pickled(content, NAMES), "Metadata", "MCoreMetadata")
        entries = _dict(root, "state_dict_metadata")
        places = _places(_dict(root, "storage_data"))
    except ValueError as error:
        raise WeightError(
            f"{path} is not the metadata of a torch_dist checkpoint: found {error}. Nothing that "
            "it names was imported or run"
        ) from error
    return _stored(path, entries, places, ignored)


_Place = tuple[str, int, int]
"""File, first byte, number of bytes."""
_Places = Mapping[tuple[str, tuple[int, ...]], _Place]
"""(key, offsets of a chunk) -> where it is."""


def _stored(
    path: Path, entries: Mapping[Any, Any], places: _Places, ignored: re.Pattern[str]
) -> Stored:
    tensors, objects, problems = {}, set(), []
    for key, entry in entries.items():
        if not isinstance(key, str) or ignored.match(key):
            continue
        if isinstance(entry, Record) and entry.name.name == "BytesStorageMetadata":
            objects.add(key)
            continue
        try:
            tensors[key] = _tensor(key, _fields(entry, "TensorStorageMetadata"), places)
        except ValueError as error:
            problems.append(f"{path}: {key[:200]!r}: found {error}")
    if problems:
        raise WeightError("\n".join(problems))
    return Stored(tensors=tensors, objects=frozenset(objects))


def _tensor(key: str, entry: Mapping[Any, Any], places: _Places) -> StoredTensor:
    shape = _sizes(entry.get("size"))
    found = entry.get("chunks")
    if not isinstance(found, list) or len(found) > MAX_CHUNKS:
        raise ValueError(f"no list of at most {MAX_CHUNKS} chunks")
    chunks = []
    for value in found:
        box = _fields(value, "ChunkStorageMetadata")
        offsets, sizes = _sizes(box.get("offsets")), _sizes(box.get("sizes"))
        if (key, offsets) not in places:
            raise ValueError(f"no place in a file for its chunk at {offsets}")
        file, start, length = places[key, offsets]
        chunks.append(Chunk(offsets=offsets, sizes=sizes, file=file, start=start, length=length))
    _check_cover(shape, chunks)
    return StoredTensor(dtype=_dtype(entry.get("properties")), shape=shape, chunks=tuple(chunks))


def _check_cover(shape: tuple[int, ...], chunks: Sequence[Chunk]) -> None:
    """Raise ValueError unless the chunks lie within the shape and cover each element once."""
    for chunk in chunks:
        if not len(chunk.offsets) == len(chunk.sizes) == len(shape) or any(
            start + size > end
            for start, size, end in zip(chunk.offsets, chunk.sizes, shape, strict=True)
        ):
            raise ValueError(
                f"a chunk of shape {chunk.sizes} at {chunk.offsets} of a tensor of shape {shape}"
            )
    if sum(prod(chunk.sizes) for chunk in chunks) != prod(shape):
        raise ValueError(f"chunks that do not cover its shape {shape}")
    for one, other in _neighbours(chunks):
        if all(
            low < other_low + other_size and other_low < low + size
            for low, size, other_low, other_size in zip(
                one.offsets, one.sizes, other.offsets, other.sizes, strict=True
            )
        ):
            raise ValueError(f"chunks at {one.offsets} and {other.offsets} that overlap")


def _neighbours(chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, Chunk]]:
    """Every two chunks that share rows of the first dim."""
    active: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets):
        first = chunk.offsets[0] if chunk.offsets else 0
        active = [other for other in active if not other.sizes or _end(other) > first]
        yield from ((other, chunk) for other in active)
        active.append(chunk)


def _end(chunk: Chunk) -> int:
    return chunk.offsets[0] + chunk.sizes[0]


def _places(entries: Mapping[Any, Any]) -> _Places:
    places = {}
    for index, value in entries.items():
        at, info = _fields(index, "MetadataIndex"), _fields(value, "_StorageInfo")
        file, start, length = (info.get(f) for f in ("relative_path", "offset", "length"))
        if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9_.\-]+\.distcp", file):
            raise ValueError("the name of a file that is not a .distcp file of its folder")
        if not _is_size(start) or not _is_size(length):
            raise ValueError(f"an impossible place in {file[:200]!r}")
        if info.get("transform_descriptors"):
            raise ValueError(f"transformed (for instance compressed) tensors in {file[:200]!r}")
        key, offset = at.get("fqn"), at.get("offset")
        if isinstance(key, str):
            places[key, () if offset is None else _sizes(offset)] = (file, start, length)
    return places


def _fields(value: Any, *names: str) -> Mapping[Any, Any]:
    """The fields of a record that is one of `names`."""
    if not isinstance(value, Record) or value.name.name not in names:
        raise ValueError(f"something other than a {names[0]}")
    if value.state is None:
        return {}
    if not isinstance(value.state, dict):
        raise ValueError(f"a {names[0]} without fields")
    return value.state


def _dict(fields: Mapping[Any, Any], name: str) -> Mapping[Any, Any]:
    value = fields.get(name)
    if not isinstance(value, dict):
        raise ValueError(f"no {name}")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    """The numbers of a torch.Size."""
    is_size = isinstance(value, Record) and value.name == Name("torch", "Size")
    sizes = value.args[0] if is_size and len(value.args) == 1 else None
    if not isinstance(sizes, tuple) or len(sizes) > MAX_DIMS or not all(map(_is_size, sizes)):
        raise ValueError("sizes that are not a torch.Size")
    return sizes


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _dtype(value: Any) -> str:
    """The name of a dtype."""
    state = value.state if isinstance(value, Record) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, Name) or dtype.module != "torch":
        raise ValueError("properties without a dtype")
    return dtype.name

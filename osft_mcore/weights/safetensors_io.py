"""Hugging Face safetensors folders: read slices into a layout, write shards in a stream."""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from osft_mcore.config.model_shape import ModelShape, read_model_shape
from osft_mcore.errors import WeightError
from osft_mcore.weights.fill import fill
from osft_mcore.weights.layout import Layout
from osft_mcore.weights.params import OUTPUT, hf_layouts, hf_tensors
from osft_mcore.weights.plan import Copy

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("BF16", "F16", "F32", "F64")


def read_hf_index(folder: str | Path) -> dict[str, Path]:
    """The file of every tensor of a Hugging Face folder (config.json and safetensors).

    Raises WeightError with all that is missing, unexpected, quantised or of the wrong shape.
    Rotary frequency buffers, and the output layer of a tied model, may be present: nothing reads
    them.
    """
    folder = Path(folder)
    shape = read_model_shape(folder)
    expected = hf_tensors(shape)
    claimed, problems = _files(folder)
    unneeded = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(shape.num_layers)}
    unneeded.add("model.rotary_emb.inv_freq")
    if shape.tied:
        unneeded.add(OUTPUT)
    problems += [f"{name} is missing" for name in expected if name not in claimed]
    problems += [
        f"{name} is unexpected in a model of type {shape.model_type}"
        for name in claimed
        if name not in expected and name not in unneeded
    ]
    index = {name: path for name, path in claimed.items() if name in expected}
    for path in sorted(set(index.values())):
        wanted = {name: expected[name] for name, file in index.items() if file == path}
        problems += _wrong_tensors(path, wanted)
    if problems:
        raise WeightError("\n".join(f"{folder}: {problem}" for problem in problems))
    return index


def load_into(
    params: Mapping[str, Tensor], layouts: Mapping[str, Layout], folder: str | Path
) -> None:
    """Fill `params` (named as `layouts`) from a Hugging Face folder, cast to their dtypes.

    Reads only the rows that the layouts name, one tensor at a time; padding becomes zero. Not
    collective. Raises WeightError if the folder or the parameters do not fit the model.
    """
    shape = read_model_shape(folder)
    index = read_hf_index(folder)

    with ExitStack() as stack:
        files = {path: stack.enter_context(_opened(path)) for path in set(index.values())}

        def rows(copy: Copy) -> Tensor:
            view = files[index[copy.src_param]].get_slice(copy.src_param)
            start, stop = copy.src_start, copy.src_start + copy.length
            part: Tensor = view[start:stop] if copy.dim == 0 else view[:, start:stop]
            return part

        fill(params, layouts, {0: hf_layouts(shape)}, rows)


def save_hf(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    shape: ModelShape,
    max_shard_bytes: int,
) -> None:
    """Write safetensors files, with an index if there are several; call on one rank.

    Takes tensors as they come and holds at most one shard of them, so a generator may reuse its
    buffer. Files get their names only once all are complete, the index last: a folder that was
    interrupted does not load. Raises WeightError if a tensor is missing, unknown, given twice or
    of the wrong shape; then nothing of it is left and earlier weights are untouched.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = []
    sizes: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    expected = hf_tensors(shape)
    try:
        for name, tensor in tensors:
            _check_tensor(name, tensor, expected, sizes)
            sizes[name] = tensor.numel() * tensor.element_size()
            if held and sum(sizes[member] for member in held) + sizes[name] > max_shard_bytes:
                _write_shard(folder, shards, held)
            held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        missing = [name for name in expected if name not in sizes]
        if missing:
            raise WeightError(f"cannot save {folder}: no tensor came for {', '.join(missing)}")
        _write_shard(folder, shards, held)
        _publish(folder, shards, sum(sizes.values()))
    finally:
        for number in range(len(shards) + 1):
            with suppress(FileNotFoundError):
                _temporary(folder, number).unlink()


def _files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Which file each tensor is said to be in, and what is wrong with the files themselves."""
    if (folder / INDEX).is_file():
        claimed = {name: folder / file for name, file in _weight_map(folder / INDEX).items()}
    elif (folder / SINGLE).is_file():
        with _opened(folder / SINGLE) as file:
            claimed = dict.fromkeys(file.keys(), folder / SINGLE)
    else:
        raise WeightError(
            f"{folder}: neither {INDEX} nor {SINGLE} is there; point model.path to a folder with "
            "safetensors, or set model.init to random"
        )
    absent = sorted({path.name for path in claimed.values() if not path.is_file()})
    problems = [f"{INDEX} names {name}, which is not there" for name in absent]
    return claimed, problems


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightError(f"{path} is not a safetensors index with a weight_map") from error
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    ):
        raise WeightError(f"{path}: weight_map must name files of the same folder")
    return weight_map


def _wrong_tensors(path: Path, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What the headers of one file say against `wanted`, in words."""
    if not path.is_file():
        return []
    problems = []
    with _opened(path) as file:
        present = set(file.keys())
        for name, tensor_shape in wanted.items():
            if name not in present:
                problems.append(f"{name} is not in {path.name}, where {INDEX} says it is")
                continue
            view = file.get_slice(name)
            if tuple(view.get_shape()) != tensor_shape:
                found = tuple(view.get_shape())
                problems.append(f"{name} has shape {found}, config.json asks for {tensor_shape}")
            if view.get_dtype() not in FLOATS:
                problems.append(
                    f"{name} is {view.get_dtype()}; expected one of {', '.join(FLOATS)}: quantised "
                    "checkpoints cannot be trained"
                )
    return problems


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise WeightError(f"{path} is not a complete safetensors file: {error}") from error


def _check_tensor(
    name: str, tensor: Tensor, expected: Mapping[str, tuple[int, ...]], done: Mapping[str, int]
) -> None:
    if name in done:
        raise WeightError(f"tensor {name!r} came twice")
    if tuple(tensor.shape) != expected.get(name):
        raise WeightError(
            f"tensor {name!r} has shape {tuple(tensor.shape)}, expected "
            f"{expected.get(name, 'no such tensor')}"
        )


def _temporary(folder: Path, number: int) -> Path:
    # Not *.safetensors: nothing that globs a folder takes it for a weight file.
    return folder / f".shard-{number}.incomplete"


def _write_shard(folder: Path, shards: list[list[str]], held: dict[str, Tensor]) -> None:
    path = _temporary(folder, len(shards))
    save_file(held, path, metadata={"format": "pt"})
    _flush(path)
    shards.append(list(held))
    held.clear()


def _publish(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Give complete shards their names; what was there before goes first."""
    for old in (folder / INDEX, folder / SINGLE, *folder.glob("model-*-of-*.safetensors")):
        old.unlink(missing_ok=True)
    if len(shards) == 1:
        _temporary(folder, 0).replace(folder / SINGLE)
    else:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards):
            file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            _temporary(folder, number).replace(folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        temporary = folder / f".{INDEX}.incomplete"
        temporary.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _flush(temporary)
        temporary.replace(folder / INDEX)
    _flush(folder)


def _flush(path: Path) -> None:
    """Make a file's contents, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Reads Hugging Face safetensors folders: any slices of them, into any layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.errors import WeightError
from osft_mcore.files import parse_json
from osft_mcore.weights.fill import fill
from osft_mcore.weights.layout import Layout, Layouts
from osft_mcore.weights.params import EMBEDDING, OUTPUT, hf_layouts, hf_tensors
from osft_mcore.weights.plan import Copy
from osft_mcore.weights.safetensors_read import FLOATS, read_header, read_rows

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ROWS_AT_ONCE: Final = 4096


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
    index = {name: claimed[name] for name in expected if name in claimed}
    for path in sorted(set(index.values())):
        wanted = {name: expected[name] for name, file in index.items() if file == path}
        problems += _wrong_tensors(path, wanted)
    if problems:
        raise WeightError("\n".join(f"{folder}: {problem}" for problem in problems))
    return index


class HfSource:
    """A Hugging Face folder as a `WeightSource` with one shard."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ConfigError or WeightError as `read_hf_index` does."""
        self.shape = read_model_shape(folder)
        self._index = read_hf_index(folder)
        self._headers = {path: read_header(path) for path in self.files}
        self._layouts = {0: hf_layouts(self.shape)}
        self._whole: dict[str, Tensor] = {}

    @property
    def files(self) -> list[Path]:
        """All that hold weights."""
        return sorted(set(self._index.values()))

    @property
    def layouts(self) -> Layouts:
        """Every tensor as itself, whole."""
        return self._layouts

    def dtype(self, shard: int, param: str) -> torch.dtype:
        """As in the file."""
        return FLOATS[self._headers[self._index[param]][param].dtype]

    def rows(self, copy: Copy) -> Tensor:
        """See `WeightSource`."""
        name, start, stop = copy.src_param, copy.src_start, copy.src_start + copy.length
        path = self._index[name]
        stored = self._headers[path][name]
        if copy.dim == 0:
            return read_rows(path, stored, start, stop)
        # Columns lie all over the file. Whoever asks for some will ask for the rest of them.
        if name not in self._whole:
            self._whole.clear()
            self._whole[name] = read_rows(path, stored, 0, stored.shape[0])
        return self._whole[name].narrow(copy.dim, start, copy.length)


def check_tied_head(folder: str | Path) -> None:
    """Raise WeightError if a tied model comes with an output layer that is not its embedding.

    Nothing reads it, so whoever made it would miss it.
    """
    folder = Path(folder)
    claimed, _ = _files(folder)
    if not read_model_shape(folder).tied or not {OUTPUT, EMBEDDING} <= claimed.keys():
        return
    head, embedding = (read_header(claimed[name])[name] for name in (OUTPUT, EMBEDDING))
    equal = (head.shape, head.dtype) == (embedding.shape, embedding.dtype) and all(
        torch.equal(
            read_rows(claimed[OUTPUT], head, row, min(row + ROWS_AT_ONCE, head.shape[0])),
            read_rows(claimed[EMBEDDING], embedding, row, min(row + ROWS_AT_ONCE, head.shape[0])),
        )
        for row in range(0, head.shape[0], ROWS_AT_ONCE)
    )
    if not equal:
        raise WeightError(
            f"{folder}: {OUTPUT} is there and differs from {EMBEDDING}, but config.json ties the "
            "two; set tie_word_embeddings to false there, or remove the tensor"
        )


def load_into(
    params: Mapping[str, Tensor], layouts: Mapping[str, Layout], folder: str | Path
) -> None:
    """Fill `params` (named as `layouts`) from a Hugging Face folder, cast to their dtypes.

    Reads only the rows that the layouts name, one tensor at a time; padding becomes zero. Not
    collective. Raises WeightError if the folder or the parameters do not fit the model.
    """
    source = HfSource(folder)
    fill(params, layouts, source.layouts, source.rows)


def _files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Which file each tensor is said to be in, and what is wrong with the files themselves."""
    if (folder / INDEX).is_file():
        claimed = {name: folder / file for name, file in _weight_map(folder / INDEX).items()}
    elif (folder / SINGLE).is_file():
        claimed = dict.fromkeys(read_header(folder / SINGLE), folder / SINGLE)
    else:
        raise WeightError(
            f"{folder}: neither {INDEX} nor {SINGLE} is there; expected a Hugging Face folder with "
            "safetensors (a model that starts from random weights needs model.init=random)"
        )
    absent = sorted({path.name for path in claimed.values() if not path.is_file()})
    problems = [f"{INDEX} names {name}, which is not there" for name in absent]
    if (folder / SINGLE).is_file() and folder / SINGLE not in claimed.values():
        problems.append(
            f"both {SINGLE} and {INDEX} are there, and programs differ in which they read; remove "
            "the one that is not meant"
        )
    for path in sorted(set(claimed.values())):
        if path.is_file():
            others = [name for name in read_header(path) if claimed.get(name) != path]
            problems += [f"{name} is in {path.name}, but {INDEX} says otherwise" for name in others]
    return claimed, problems


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = parse_json(path.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
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
    present = read_header(path)
    for name, tensor_shape in wanted.items():
        if name not in present:
            problems.append(f"{name} is not in {path.name}, where {INDEX} says it is")
            continue
        found = present[name]
        if found.shape != tensor_shape:
            problems.append(f"{name} has shape {found.shape}, config.json asks for {tensor_shape}")
        if found.dtype not in FLOATS:
            problems.append(
                f"{name} is {found.dtype}; expected one of {', '.join(FLOATS)}: quantised "
                "checkpoints cannot be trained"
            )
    return problems

"""Opens a checkpoint for reading, whichever of the formats it has."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from osft_mcore.checkpoint.folder import STATE, checkpoints_in
from osft_mcore.checkpoint.index import INDEX
from osft_mcore.checkpoint.manifest import MANIFEST, problems_of, read_manifest
from osft_mcore.checkpoint.source import CheckpointSource, read_index
from osft_mcore.checkpoint.torch_dist_metadata import METADATA
from osft_mcore.checkpoint.torch_dist_reader import TRACKER, TorchDistSource
from osft_mcore.config.model_shape import ModelShape, read_model_shape
from osft_mcore.errors import ConfigError, OsftError, WeightError
from osft_mcore.weights.params import hf_layouts, hf_tensors
from osft_mcore.weights.plan import make_plan
from osft_mcore.weights.safetensors_io import INDEX as HF_INDEX
from osft_mcore.weights.safetensors_io import HfSource
from osft_mcore.weights.side_files import CONFIG
from osft_mcore.weights.source import WeightSource

Format = Literal["safetensors", "torch_dist", "hf"]
MODEL: Final = "model"
"""The subfolder with the side files of the Hugging Face model."""
_DECISIVE: Final = (INDEX, STATE, METADATA, CONFIG, HF_INDEX, f"{MODEL}/{CONFIG}")
_TENSORS: Final = ("*.safetensors", "*.distcp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A checkpoint that can be read."""

    folder: Path
    source: WeightSource
    shape: ModelShape
    model: Path
    """Folder with config.json and side files."""


def format_of(folder: Path) -> Format:
    """What lies in `folder`. Raises ConfigError if it is none of the formats, with advice."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    if (folder / INDEX).is_file():
        return "safetensors"
    if (folder / METADATA).is_file() or (folder / TRACKER).is_file():
        return "torch_dist"
    if (folder / CONFIG).is_file():
        return "hf"
    raise ConfigError(f"{folder} holds no checkpoint: {_advice(folder)}")


def config_folder(folder: Path, *, hf_config: Path | None, hf: Path | None) -> Path | None:
    """`hf_config`; without it `hf`, the folder to compare with, if the checkpoint has no model/."""
    if hf_config is None and not (folder / MODEL / CONFIG).is_file():
        return hf
    return hf_config


def open_source(folder: Path, *, hf_config: Path | None) -> tuple[WeightSource, ModelShape, Path]:
    """The weights, the model's shape, and the folder with its config.json and side files.

    `hf_config` is that folder, where it is not model/ in the checkpoint. Rows are not counted.
    Raises ConfigError or WeightError with all that is wrong; a quantised model is.
    """
    found = format_of(folder)
    if found == "hf":
        shape = read_model_shape(folder)
        return HfSource(folder), shape, folder
    model = hf_config or folder / MODEL
    if not (model / CONFIG).is_file():
        raise ConfigError(
            f"--hf-config: no {CONFIG} in {model}; name the Hugging Face folder of this model"
        )
    shape = read_model_shape(model)
    if found == "torch_dist":
        return TorchDistSource(folder, shape), shape, model
    return CheckpointSource(folder, read_index(folder)), shape, model


def open_checkpoint(folder: Path, *, hf_config: Path | None, hashes: bool) -> Opened:
    """Open a checkpoint in a Megatron layout and see that it has every row of the model.

    `hf_config` as in `open_source`. `hashes`: read every file to compare it with the manifest.
    Raises ConfigError or WeightError with all that is wrong.
    """
    found = format_of(folder)
    if found == "hf":
        raise ConfigError(f"{folder} is a Hugging Face folder, not one in a Megatron layout")
    if found == "safetensors" or (folder / MANIFEST).is_file():
        check_manifest(folder, hashes=hashes)
    source, shape, model = open_source(folder, hf_config=hf_config)
    check_rows(source, shape, str(folder))
    return Opened(folder=folder, source=source, shape=shape, model=model)


def check_manifest(folder: Path, *, hashes: bool) -> None:
    """Raise WeightError if a file is not as the manifest says, or one that matters is not in it.

    Nor may a checkpoint in a Megatron layout have files elsewhere: a copy of it would not be whole.
    Hugging Face folders may: in a hub cache all are links.
    """
    problems = problems_of(folder, hashes=hashes)
    try:
        listed = read_manifest(folder).keys()
    except WeightError as error:
        raise WeightError("\n".join(problems)) from error
    problems += [
        f"{folder / name} is part of the checkpoint, but {MANIFEST} does not name it"
        for name in sorted(_must_be_listed(folder) - listed)
    ]
    if format_of(folder) != "hf":
        problems += [
            f"{folder / name} is a link out of the checkpoint; replace it by the file"
            for name in _links_out(folder, sorted(listed))
        ]
    if problems:
        raise WeightError("\n".join(problems))


def _links_out(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of the files that lie outside of the checkpoint."""
    home = folder.resolve()
    present = (name for name in names if (folder / name).is_file())
    return [name for name in present if not (folder / name).resolve().is_relative_to(home)]


def _must_be_listed(folder: Path) -> set[str]:
    """Files that decide what is read, and all with tensors."""
    names = {name for name in _DECISIVE if (folder / name).is_file()}
    names |= {path.name for pattern in _TENSORS for path in folder.glob(pattern)}
    if format_of(folder) == "safetensors":
        # A damaged index is the business of whoever reads it.
        with suppress(OsftError):
            names |= {piece.file for piece in read_index(folder).pieces}
    return names


def check_rows(source: WeightSource, shape: ModelShape, name: str) -> None:
    """Raise WeightError unless `source` has every row of the model, and nothing else.

    `name` says in messages what the source is.
    """
    expected = hf_tensors(shape)
    ends = _ends(source)
    problems = [
        f"{name}: {tensor!r} is not a tensor of a model of type {shape.model_type}"
        for tensor in sorted({tensor for tensor, _ in ends} - expected.keys())
    ]
    # The plan asks for the rows of the model, and would not miss more.
    problems += [
        f"{name}: {tensor!r} goes to {end} along dim {dim}, config.json asks for {size}"
        for (tensor, dim), end in ends.items()
        if end > (size := dict(enumerate(expected.get(tensor, ()))).get(dim, end))
    ]
    try:
        make_plan(source.layouts, {0: hf_layouts(shape)})
    except WeightError as error:
        problems += [f"{name}: {line}" for line in str(error).splitlines()]
    if problems:
        raise WeightError("\n".join(problems))


def _ends(source: WeightSource) -> dict[tuple[str, int], int]:
    """Where the rows of each tensor end, by tensor and the dim that they lie along."""
    ends: dict[tuple[str, int], int] = {}
    for layouts in source.layouts.values():
        for layout in layouts.values():
            for at in layout.intervals:
                if at.tensor is not None:
                    key = at.tensor, layout.dim
                    ends[key] = max(ends.get(key, 0), at.stop)
    return ends


def training_state(folder: Path) -> Mapping[str, Any]:
    """state.json of a training checkpoint; empty for any other."""
    path = folder / STATE
    if not path.is_file():
        return {}
    try:
        # Of a run's own numbers some may be infinite.
        state: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise WeightError(f"{path} is damaged: {error}") from error
    values: dict[str, Any] = state if isinstance(state, dict) else {}
    step = values.get("step")
    if type(step) is not int or step < 0:
        raise WeightError(f"{path} is damaged: it does not say the step")
    return values


def _advice(folder: Path) -> str:
    for root in (folder, folder / "checkpoints"):
        if steps := checkpoints_in(root):
            return f"a checkpoint of the run is {steps[0]}"
    inner = sorted(path.parent for path in folder.glob(f"*/{METADATA}"))
    if inner:
        return f"name the folder of one iteration, such as {inner[-1]}"
    return f"found neither {INDEX} nor {METADATA} nor {CONFIG}"

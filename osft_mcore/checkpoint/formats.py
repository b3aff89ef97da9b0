"""Opens a checkpoint for reading, whichever of the formats it has."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from osft_mcore.checkpoint.folder import STATE, checkpoints_in
from osft_mcore.checkpoint.index import INDEX
from osft_mcore.checkpoint.manifest import MANIFEST, problems_of
from osft_mcore.checkpoint.source import CheckpointSource, read_index
from osft_mcore.checkpoint.torch_dist_metadata import METADATA
from osft_mcore.checkpoint.torch_dist_reader import TRACKER, TorchDistSource
from osft_mcore.config.model_shape import ModelShape, read_model_shape
from osft_mcore.errors import ConfigError, WeightError
from osft_mcore.weights.params import hf_layouts, hf_tensors
from osft_mcore.weights.plan import make_plan
from osft_mcore.weights.safetensors_io import HfSource
from osft_mcore.weights.side_files import CONFIG
from osft_mcore.weights.source import WeightSource

Format = Literal["safetensors", "torch_dist", "hf"]
MODEL: Final = "model"
"""The subfolder with the side files of the Hugging Face model."""


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


def open_source(folder: Path, *, hf_config: Path | None) -> tuple[WeightSource, ModelShape, Path]:
    """The weights, the model's shape, and the folder with its config.json and side files.

    `hf_config` is that folder, where it is not model/ in the checkpoint. Rows are not counted.
    Raises ConfigError or WeightError with all that is wrong.
    """
    found = format_of(folder)
    if found == "hf":
        source = HfSource(folder)
        return source, source.shape, folder
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

    `hf_config` as in `open_source`. `hashes`: read every file to
    compare it with the manifest. Raises ConfigError or WeightError with all that is wrong.
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
    """Raise WeightError if a file is not as the manifest says."""
    if problems := problems_of(folder, hashes=hashes):
        raise WeightError("\n".join(problems))


def check_rows(source: WeightSource, shape: ModelShape, name: str) -> None:
    """Raise WeightError unless `source` has every row of the model, and nothing else.

    `name` says in messages what the source is.
    """
    expected = hf_tensors(shape)
    held = {
        interval.tensor
        for layouts in source.layouts.values()
        for layout in layouts.values()
        for interval in layout.intervals
        if interval.tensor is not None
    }
    problems = [
        f"{name}: {tensor!r} is not a tensor of a model of type {shape.model_type}"
        for tensor in sorted(held - expected.keys())
    ]
    try:
        make_plan(source.layouts, {0: hf_layouts(shape)})
    except WeightError as error:
        problems += [f"{name}: {line}" for line in str(error).splitlines()]
    if problems:
        raise WeightError("\n".join(problems))


def training_state(folder: Path) -> Mapping[str, Any]:
    """state.json of a training checkpoint; empty for any other."""
    path = folder / STATE
    if not path.is_file():
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightError(f"{path} is damaged: {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise WeightError(f"{path} is damaged: it does not say the step")
    return state


def _advice(folder: Path) -> str:
    for root in (folder, folder / "checkpoints"):
        if steps := checkpoints_in(root):
            return f"a checkpoint of the run is {steps[0]}"
    inner = sorted(path.parent for path in folder.glob(f"*/{METADATA}"))
    if inner:
        return f"name the folder of one iteration, such as {inner[-1]}"
    return f"found neither {INDEX} nor {METADATA} nor {CONFIG}"

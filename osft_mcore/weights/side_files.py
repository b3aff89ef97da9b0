"""What a Hugging Face folder holds beside weights: config, tokenizer, templates, licence."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from osft_mcore.errors import WeightError
from osft_mcore.files import json_bytes, parse_json

CONFIG: Final = "config.json"
CARD: Final = "README.md"
BASE: Final = "BASE_MODEL_"
"""Before the names of what speaks of the base model, in a folder with a model trained from it."""
_TEMPLATES: Final = "additional_chat_templates"
"""The one subfolder that transformers reads."""
_WEIGHTS: Final = (
    ".safetensors",
    ".index.json",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
)
_LARGEST: Final = 128 << 20
"""In bytes; the largest tokenizers have a fifth of it."""
_OURS: Final = ("manifest.json",)
"""Speaks of the files of another folder."""
_OF_THE_MODEL: Final = ("README", "LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFiles:
    """The files to carry along, and the rest."""

    carried: Mapping[str, Path]
    """Path within the target folder -> file; without config.json, which always goes along."""
    left_out: Mapping[str, str]
    """Name -> why it stays; weights are not listed."""


def side_files(folder: str | Path, *, derived: bool = False) -> SideFiles:
    """Sort the files of a Hugging Face folder.

    Links are followed inside of the folder and into the blobs of a hub cache, never elsewhere.
    `derived`: for a model trained from this one, to which card and licence do not speak: they
    become BASE_MODEL_README.md and so on, and replace such files of an earlier generation.
    """
    folder = Path(folder)
    carried: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for name, path in _entries(folder):
        if path.name.endswith(_WEIGHTS) or name == CONFIG:
            continue
        if reason := _reason_to_stay(folder, name, path):
            left_out[name] = reason
        else:
            carried[name] = path
    return SideFiles(carried=_renamed(carried) if derived else carried, left_out=left_out)


def config_bytes(folder: str | Path, *, dtype: torch.dtype | None = None) -> bytes:
    """config.json, saying `dtype` if one is given; unchanged where it says so already."""
    path = Path(folder) / CONFIG
    content = path.read_bytes()
    try:
        config = parse_json(content)
    except ValueError as error:
        raise WeightError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise WeightError(f"{path} is not a JSON object")
    wanted = str(dtype).removeprefix("torch.")
    said = [config[key] for key in ("dtype", "torch_dtype") if key in config]
    if dtype is None or (said and all(value == wanted for value in said)):
        return content
    config.pop("torch_dtype", None)
    return json_bytes({**config, "dtype": wanted})


def read_side_files(
    folder: str | Path, *, dtype: torch.dtype | None = None, derived: bool = False
) -> dict[str, bytes]:
    """config.json (see `config_bytes`) and all that `side_files` carries, by path."""
    found = side_files(folder, derived=derived)
    contents = {name: path.read_bytes() for name, path in found.carried.items()}
    return {CONFIG: config_bytes(folder, dtype=dtype), **contents}


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """Everything in the folder, and in the one subfolder that matters."""
    for path in sorted(folder.iterdir()):
        if path.name == _TEMPLATES and path.is_dir() and not path.is_symlink():
            for inner in sorted(path.iterdir()):
                yield f"{_TEMPLATES}/{inner.name}", inner
        else:
            yield path.name, path


def _reason_to_stay(folder: Path, name: str, path: Path) -> str:
    """Why a file or subfolder is not carried; empty if it is."""
    if path.is_symlink():
        try:
            home, end = folder.resolve(), path.resolve()
        except (OSError, RuntimeError):
            return "a link that ends nowhere"
        # A hub cache: snapshots/<revision>/<file> -> ../../blobs/<hash>.
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
        if not (end.is_relative_to(home) or end.is_relative_to(blobs)):
            return f"a link out of the folder, to {end}"
    if path.is_dir():
        return "a folder"
    if not path.is_file():
        return "not a file"
    if path.name.startswith("."):
        return "a hidden file"
    if path.stat().st_size > _LARGEST:
        return f"larger than {_LARGEST >> 20} MiB"
    return "of another folder" if name in _OURS else ""


def _renamed(carried: Mapping[str, Path]) -> dict[str, Path]:
    """Card and licence under names that say whose they are; those of its own base give way."""
    own = {name for name in carried if name.upper().startswith(_OF_THE_MODEL)}
    others = {name: path for name, path in carried.items() if name not in own}
    return {**others, **{f"{BASE}{name}": carried[name] for name in sorted(own)}}

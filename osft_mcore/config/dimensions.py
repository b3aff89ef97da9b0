"""Dimensions of models that this machine does not have, for what only plans."""

from pathlib import Path

from osft_mcore.config.load import default_config_dir
from osft_mcore.config.model_shape import ModelShape, model_shape
from osft_mcore.errors import ConfigError
from osft_mcore.files import parse_json


def known_shape(model_path: str, config_dir: Path | None = None) -> ModelShape | None:
    """What conf/model/dimensions says of a folder with this name; None if it does not know it.

    Raises ConfigError if the file there is not what model_shape reads.
    """
    file = dimensions_file(model_path, config_dir)
    if file is None:
        return None
    raw = parse_json(file.read_bytes())
    if not isinstance(raw, dict):
        raise ConfigError(f"model.path: {file} is not a JSON object")
    return model_shape(raw, source=str(file))


def dimensions_file(model_path: str, config_dir: Path | None = None) -> Path | None:
    """The file of `known_shape`, under `config_dir` (default: conf/ beside the package)."""
    if not (name := Path(model_path).name):
        return None
    try:
        folder = default_config_dir() if config_dir is None else config_dir
    except ConfigError:
        # Installed without conf/: nothing is known there.
        return None
    file = folder / "model" / "dimensions" / f"{name}.json"
    return file if file.is_file() else None

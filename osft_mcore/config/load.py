"""Compose conf/ and the command line into a RunConfig; every problem is reported at once."""

import dataclasses
import difflib
import json
import math
import re
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

from osft_mcore.config.schema import RunConfig
from osft_mcore.errors import ConfigError

_ADAPTER: Final = TypeAdapter(RunConfig)

_EXPECTED: Final = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dataclass_type": "a section of options",
}
_NUMBERS: Final = re.compile(r"[\d.,:+-]+")
"""What Hydra may take for a number, or for several: to an option that is a text it is a text."""


def load_config(overrides: Sequence[str], config_dir: Path | None = None) -> RunConfig:
    """Compose `config_dir` (default: `default_config_dir()`) with command-line overrides.

    `group=choice` picks conf/<group>/<choice>.yaml; anything else is `dotted.key=value`.
    Raises ConfigError with every unknown key, unknown choice and wrong type found.
    """
    folder = default_config_dir() if config_dir is None else config_dir.resolve()
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"--config-dir: no config.yaml in {str(folder)!r}")
    accepted, problems = _parse_overrides(overrides, folder)
    raw = _compose(accepted, folder, problems)
    config = _validate(raw, problems)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def default_config_dir() -> Path:
    """conf/ beside the package: the repository that an editable install points at.

    Raises ConfigError (option --config-dir) where the package is installed without it.
    """
    folder = Path(__file__).resolve().parents[2] / "conf"
    if not folder.is_dir():
        raise ConfigError(
            f"--config-dir: no conf/ beside the package ({str(folder)!r} does not exist); "
            "name the folder that holds config.yaml"
        )
    return folder


def leaf_paths() -> tuple[str, ...]:
    """Dotted paths of all options, in schema order."""
    return tuple(path for path, kind in _kinds(RunConfig) if not dataclasses.is_dataclass(kind))


def as_options(config: RunConfig) -> dict[str, Any]:
    """The whole config as nested plain values, by the names that users write."""
    renamed: dict[str, Any] = _renamed(dataclasses.asdict(config))
    return renamed


def from_options(options: Mapping[str, Any]) -> RunConfig:
    """The config of `as_options`. Raises ConfigError with every unknown key and wrong type."""
    problems: list[str] = []
    config = _validate(dict(options), problems)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def to_yaml(config: RunConfig) -> str:
    """YAML text of the whole config; as config.yaml in a folder, `load_config` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape(as_options(config))))


def _written(name: str) -> str:
    """`async_` is `async` to users; Python keeps that word for itself."""
    return name.rstrip("_")


def _renamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {_written(key): _renamed(item) for key, item in value.items()}
    return value


def _kinds(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths of sections and options, with their types."""
    for field, kind in typing.get_type_hints(section).items():
        name = _written(field)
        yield prefix + name, kind
        if dataclasses.is_dataclass(kind):
            yield from _kinds(typing.cast(type, kind), f"{prefix}{name}.")


def _escape(value: Any) -> Any:
    """Keep a literal `${` in text from being read as an interpolation."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escape(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _parse_overrides(overrides: Sequence[str], folder: Path) -> tuple[list[str], list[str]]:
    """Split into what Hydra gets and what is wrong with the rest."""
    groups = {entry.name for entry in folder.iterdir() if entry.is_dir()}
    parser = OverridesParser.create()
    texts = {path for path, kind in _kinds(RunConfig) if kind is str}
    accepted: list[str] = []
    problems: list[str] = []
    for given in overrides:
        text = _quoted(given, texts)
        try:
            override = parser.parse_override(text)
        except HydraException:
            override = None
        if override is None or not override.key_or_group:
            problems.append(
                f"{given!r}: not an override; expected key=value or group=choice "
                "(text with spaces or special characters needs quotes: \"key='a, b'\")"
            )
            continue
        problem = _override_problem(override, folder, groups, texts)
        if problem is None:
            accepted.append(_for_hydra(text, override, groups))
        else:
            problems.append(problem)
    return accepted, problems


def _quoted(text: str, texts: Collection[str]) -> str:
    """`evaluation.devices=6,7` names two GPUs; Hydra would take it for two runs to make."""
    key, _, value = text.partition("=")
    is_text = key.lstrip("+") in texts and _NUMBERS.fullmatch(value)
    return f"{key}='{value}'" if is_text else text


def _for_hydra(text: str, override: Override, groups: set[str]) -> str:
    """Most options stand in the schema, not in YAML, so a plain `key=value` has to force-add."""
    is_group = override.key_or_group in groups or "/" in override.key_or_group
    if override.type is OverrideType.CHANGE and override.package is None and not is_group:
        return "++" + text
    return text


def _override_problem(
    override: Override, folder: Path, groups: set[str], texts: Collection[str]
) -> str | None:
    key = override.key_or_group
    if override.is_sweep_override():
        hint = f"text with commas needs quotes: \"{key}='a,b'\""
        if key not in texts:
            hint = f"a list is written {key}=[a,b]"
        return f"{key}: found several values, expected one; a run takes one value ({hint})"
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return f"{key}: Hydra only composes the options here; set output_dir for the run folder"
    if key not in groups or override.type is OverrideType.DEL:
        return None
    choice = override.value()
    available = sorted(path.stem for path in (folder / key).glob("*.yaml"))
    if isinstance(choice, str) and choice in available:
        return None
    hint = _did_you_mean(difflib.get_close_matches(str(choice), available, n=1), f"{key}=")
    shown = "null" if choice is None else choice
    return f"{key}={shown}: no such choice{hint}; available are {', '.join(available)}"


def _compose(overrides: list[str], folder: Path, problems: list[str]) -> dict[str, Any]:
    """The composed options over the schema's defaults; adds to `problems` what Hydra refuses."""
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(folder), job_name="osft", version_base="1.3"):
            stated = _stated(overrides)
            problems += _choices_that_lose(overrides)
        problems += [
            f"{path}: has no value (???); set it" for path, v in _scalars(stated) if v == "???"
        ]
        # Laid over the defaults, ${train.lr} reaches an option that no YAML file sets.
        merged = OmegaConf.create(_laid_over(as_options(RunConfig()), stated))
        resolved = OmegaConf.to_container(merged, resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        problems.append(f"{str(folder)!r} does not compose: {' '.join(str(error).split())}")
        return {}
    assert isinstance(resolved, dict), "a composed config is a mapping"
    return {str(key): value for key, value in resolved.items()}


def _stated(overrides: Sequence[str]) -> Any:
    """What conf/ and the overrides state; Hydra must be initialised."""
    return OmegaConf.to_container(hydra.compose("config", list(overrides)), resolve=False)


def _choices_that_lose(overrides: Sequence[str]) -> list[str]:
    """Values of `group=choice` that the preset overwrites: the choice would be without effect.

    Not those that a `dotted.key=value` decides in any case.
    """
    choices = [text for text in overrides if not text.startswith(("+", "~"))]
    presets = [text for text in choices if text.startswith("experiment=")]
    chosen = [text for text in choices if text not in presets]
    if not (presets and chosen):
        return []
    given = {text.lstrip("+").split("=")[0] for text in overrides}
    unset = dict(_scalars(_stated([])))
    kept = dict(_scalars(_stated([*presets, *chosen])))
    return [
        f"{choice}: states {path} = {_show(value)}, but {presets[-1]} states {_show(kept[path])}, "
        f"which would win; leave out {choice} and set {path} itself"
        for choice in chosen
        for path, value in _scalars(_stated([choice]))
        if path not in given
        and (path not in unset or unset[path] != value)
        and kept.get(path, value) != value
    ]


def _laid_over(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _laid_over(below.get(key), value) for key, value in above.items()}


def _validate(raw: dict[str, Any], problems: list[str]) -> RunConfig | None:
    not_finite = [
        (path, value)
        for path, value in _scalars(raw)
        if isinstance(value, float) and not math.isfinite(value)
    ]
    problems += [f"{path}: found {value}, expected a finite number" for path, value in not_finite]
    seen = {path for path, _ in not_finite}
    try:
        # Strict JSON mode: ints pass for floats and lists for tuples; text never for numbers.
        return _ADAPTER.validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            path = ".".join(str(part) for part in detail["loc"])
            if path not in seen:
                problems += _schema_problems(path, dict(detail))
        return None


def _scalars(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is not a filled mapping or list, with its dotted path."""
    if value and isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _scalars(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _schema_problems(path: str, detail: dict[str, Any]) -> list[str]:
    kind, found = str(detail["type"]), detail["input"]
    if kind == "unexpected_keyword_argument":
        return [_unknown(leaf, value) for leaf, value in _scalars(found, path)]
    if kind == "literal_error":
        expected = str(detail["ctx"]["expected"])
    else:
        expected = _EXPECTED.get(kind, str(detail["msg"]))
    return [f"{path}: found {_show(found)}, expected {expected}"]


def _unknown(path: str, value: Any) -> str:
    return f"{path}: unknown option{_suggest(path)}"


def _show(value: Any) -> str:
    return repr(value) if isinstance(value, str) else json.dumps(value)


def _suggest(path: str) -> str:
    """`; did you mean ...?`: the same name in another section first, then close spellings."""
    known = [candidate for candidate, _ in _kinds(RunConfig)]
    name = path.rsplit(".", 1)[-1]
    same_name = [candidate for candidate in known if candidate.rsplit(".", 1)[-1] == name]
    closest = difflib.get_close_matches(path, same_name, n=1, cutoff=0.8)
    return _did_you_mean(closest or same_name or difflib.get_close_matches(path, known, n=1))


def _did_you_mean(candidates: Sequence[str], prefix: str = "") -> str:
    if not candidates:
        return ""
    return f"; did you mean {' or '.join(prefix + candidate for candidate in candidates)}?"

"""What a Hugging Face config.json says about a dense decoder, as one plain value."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from osft_mcore.errors import ConfigError
from osft_mcore.files import parse_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one model family differs from the common dense decoder."""

    qkv_bias: bool
    qk_norm: bool
    vllm_reads_head_dim: bool = True
    """False: vLLM takes hidden / heads whatever config.json says."""
    window_unless_null: int | None = None
    """Set: attention is windowed unless sliding_window is null; this many where it is left out."""


FAMILIES: Final = MappingProxyType(
    {
        "qwen2": Family(qkv_bias=True, qk_norm=False, vllm_reads_head_dim=False),
        "qwen3": Family(qkv_bias=False, qk_norm=True),
        "llama": Family(qkv_bias=False, qk_norm=False),
        "mistral": Family(qkv_bias=False, qk_norm=False, window_unless_null=4096),
    }
)
"""A new dense family is one entry here."""

LLAMA3_ROPE: Final = MappingProxyType(
    {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
)
"""What Megatron-Core 0.16.1 hard-codes for Llama 3.x rope scaling."""

_SIZES: Final = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)
_OPTIONAL_SIZES: Final = (
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
)
_OPTIONAL_NUMBERS: Final = (
    "rms_norm_eps",
    "rope_theta",
    "initializer_range",
    "partial_rotary_factor",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.x frequency scaling."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Dimensions and switches of a dense decoder; everything a layout needs."""

    model_type: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    """The output layer is the embedding."""
    qkv_bias: bool
    qk_norm: bool
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position: int
    init_std: float

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, the tied output layer counted once."""
        attention = (
            self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads) * self.hidden
            + (self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.qkv_bias
            + 2 * self.head_dim * self.qk_norm
        )
        layer = attention + 3 * self.ffn * self.hidden + 2 * self.hidden
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.num_layers * layer + embeddings + self.hidden


def padded_vocab(vocab: int, *, multiple: int, tp: int) -> int:
    """Vocabulary rows of the actor, padding included: a multiple of both."""
    step = math.lcm(multiple, tp)
    return -(-vocab // step) * step


def read_model_shape(folder: str | Path) -> ModelShape:
    """Read `folder`/config.json.

    Raises ConfigError (option model.path) if the file is missing or not JSON, if the model type
    is not in FAMILIES, or if it uses a feature that this package does not train.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"model.path: no config.json in {str(folder)!r}; expected a Hugging Face model folder"
        )
    try:
        raw = parse_json(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"model.path: {path} is not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"model.path: {path} is not a JSON object")
    return model_shape(raw, source=str(path))


def model_shape(raw: dict[str, Any], *, source: str) -> ModelShape:
    """Turn the contents of a config.json into a ModelShape; `source` is named in errors."""
    model_type = raw.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        found = "has no model_type" if model_type is None else f"has model_type {model_type!r}"
        raise ConfigError(
            f"model.path: {source} {found}; supported are {', '.join(sorted(FAMILIES))}"
        )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"model.path: {source}: its rope section is {rope!r}, expected an object")
    problems = [*_unsupported(raw, rope, family), *_wrong_numbers(raw, rope)]
    if problems:
        raise ConfigError([f"model.path: {source}: {problem}" for problem in problems])
    num_heads = int(raw["num_attention_heads"])
    return ModelShape(
        model_type=str(model_type),
        num_layers=int(raw["num_hidden_layers"]),
        hidden=int(raw["hidden_size"]),
        num_heads=num_heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
        head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // num_heads),
        ffn=int(raw["intermediate_size"]),
        vocab=int(raw["vocab_size"]),
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        norm_eps=float(raw.get("rms_norm_eps") or 1e-6),
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(rope),
        max_position=int(raw.get("max_position_embeddings") or 2048),
        init_std=float(raw.get("initializer_range") or 0.02),
    )


def _wrong_numbers(raw: dict[str, Any], rope: dict[str, Any]) -> Iterator[str]:
    """Numbers that are missing (null counts as missing), of another type, or not positive."""
    for key in (*_SIZES, *_OPTIONAL_SIZES):
        if key in _SIZES or raw.get(key) is not None:
            yield from _unless_positive(raw, key, whole=True)
    for section in (raw, rope):
        for key in _OPTIONAL_NUMBERS:
            if section.get(key) is not None:
                yield from _unless_positive(section, key, whole=False)
    if _rope_type(rope) == "llama3":
        for key in ("factor", "low_freq_factor", "high_freq_factor"):
            yield from _unless_positive(rope, key, whole=False)
        yield from _unless_positive(rope, "original_max_position_embeddings", whole=True)


def _unless_positive(section: dict[str, Any], key: str, *, whole: bool) -> Iterator[str]:
    value = section.get(key)
    kind, name = (int, "integer") if whole else (int | float, "number")
    if value is None:
        yield f"{key} is missing"
    elif isinstance(value, bool) or not isinstance(value, kind) or value <= 0:
        yield f"{key} is {value!r}, expected a positive {name}"


def _rope_type(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    if _rope_type(rope) == "default":
        return None
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position=int(rope["original_max_position_embeddings"]),
    )


def _window_that_cuts(raw: dict[str, Any], family: Family) -> Iterator[str]:
    """A sliding window that hides earlier tokens; one as long as the longest sequence does not."""
    if raw.get("use_sliding_window"):
        yield "use_sliding_window true is not supported"
    if family.window_unless_null is None:
        return
    window = raw.get("sliding_window", family.window_unless_null)
    longest = raw.get("max_position_embeddings")
    if isinstance(window, int) and not (isinstance(longest, int) and longest <= window):
        yield (
            f"sliding_window {window} is shorter than max_position_embeddings {longest}, which is "
            "not supported; sliding_window null is, and so is a shorter maximum"
        )


def _unsupported(raw: dict[str, Any], rope: dict[str, Any], family: Family) -> list[str]:
    """Features that would train to something other than what transformers computes."""
    problems = []
    if _rope_type(rope) not in ("default", "llama3"):
        problems.append(f"rope type {_rope_type(rope)!r} is not supported (default, llama3 are)")
    if _rope_type(rope) == "llama3":
        for key, supported in LLAMA3_ROPE.items():
            if rope.get(key) is not None and rope[key] != supported:
                problems.append(f"rope {key} {rope[key]!r} is not supported ({supported} is)")
    if raw.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {raw['hidden_act']!r} is not supported (silu is)")
    if raw.get("attention_bias") and not family.qkv_bias:
        problems.append("attention_bias true is not supported for this family")
    if raw.get("mlp_bias"):
        problems.append("mlp_bias true is not supported")
    problems += _window_that_cuts(raw, family)
    if (quantised := raw.get("quantization_config")) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        problems.append(
            f"quantization_config ({method}) is not supported: name the folder of the model before "
            "it was quantised"
        )
    if raw.get("partial_rotary_factor") not in (None, 1):
        problems.append("partial_rotary_factor other than 1 is not supported")
    return problems

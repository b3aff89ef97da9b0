"""A config.json that cannot be trained exactly as transformers computes it is refused, by key."""

from typing import Any

import pytest

from osft_mcore.config.model_shape import FAMILIES, ModelShape, model_shape
from osft_mcore.errors import ConfigError

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "sliding_window": None,
}


def read(model_type: str, **changes: Any) -> ModelShape:
    return model_shape(SIZES | {"model_type": model_type} | changes, source="config.json")


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_family_reads_the_same_sizes(model_type: str) -> None:
    shape = read(model_type)
    assert (shape.hidden, shape.head_dim, shape.num_kv_heads) == (64, 16, 4)
    assert (shape.qkv_bias, shape.qk_norm) == (model_type == "qwen2", model_type == "qwen3")


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias true is not supported"),
        ("qwen2", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config .fp8. is"),
        ("llama", {"attention_bias": True}, "attention_bias true is not supported"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window true is not supported"),
        ("mistral", {"sliding_window": 128}, "sliding_window 128 is shorter than"),
        ("mistral", {"sliding_window": "x"}, "sliding_window is 'x', expected a positive integer"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1"),
        ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn' is not supported"),
    ],
)
def test_what_would_train_differently_is_refused(
    model_type: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(model_type, **changes)


def test_a_window_as_long_as_the_longest_sequence_hides_nothing() -> None:
    assert read("mistral", sliding_window=256).max_position == 256
    assert read("qwen2", sliding_window=128).max_position == 256, "off unless use_sliding_window"


def test_a_mistral_without_the_key_has_the_family_s_window() -> None:
    left_out = SIZES | {"model_type": "mistral", "max_position_embeddings": 32768}
    del left_out["sliding_window"]
    with pytest.raises(ConfigError, match="sliding_window 4096 is shorter than"):
        model_shape(left_out, source="config.json")


def test_an_unknown_family_is_named_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"'gpt2'; supported are llama, mistral, qwen2, qwen3"):
        read("gpt2")

"""Small random Hugging Face models, made by transformers itself."""

from pathlib import Path
from typing import Any

import torch
import transformers

KINDS = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
}

MAX_POSITIONS = 256


def save_random_model(
    folder: Path,
    kind: str = "qwen2",
    *,
    vocab: int = 67,
    tied: bool = False,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    ffn: int = 96,
    rms_norm_eps: float = 1e-6,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Write config.json and safetensors; biases and norms are random too, so nothing is neutral."""
    config_class, model_class = KINDS[kind]
    config = config_class(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=ffn,
        tie_word_embeddings=tied,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=rms_norm_eps,
        **overrides,
    )
    torch.manual_seed(seed)
    model = model_class(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder)
    return folder


def reference_logits(folder: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    """What transformers computes, [B, S, vocab] in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        return model(tokens_BS).logits

"""Floating-point operations of training, and what devices could do; needs no model."""

from collections.abc import Sequence
from typing import Final

from osft_mcore.config.model_shape import ModelShape

PEAK_TFLOPS: Final = {
    "A100": 312.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "B200": 2250.0,
}
"""Dense bf16 peaks of the vendors' data sheets (SXM), by a part of the device's name."""


def training_flops(shape: ModelShape, lengths: Sequence[int]) -> float:
    """Operations that forward and backward of these sequences need, recomputation not counted.

    The usual convention: the output layer counts for every token, although answers alone need it.
    Of a sequence of n tokens: 6 n P + 6 L d n^2 with P the weights of all matrix products (the
    output layer among them, the embedding not), L layers and d = heads * head_dim; attention is
    causal, half of n^2 (Narayanan et al. 2021, arXiv:2104.04473, appendix, without recomputation).
    """
    width = shape.num_heads * shape.head_dim
    attention = shape.hidden * (2 * width + 2 * shape.num_kv_heads * shape.head_dim)
    layer = attention + 3 * shape.hidden * shape.ffn
    weights = shape.num_layers * layer + shape.vocab * shape.hidden
    return float(sum(6 * n * weights + 6 * shape.num_layers * width * n * n for n in lengths))

"""What divides what: how a model can be cut, and the nearest sizes that work."""

import math
from collections.abc import Iterable, Iterator
from typing import Final

from osft_mcore.config.model_shape import ModelShape, padded_vocab

VOCAB_PADDING: Final = 64
"""vLLM's DEFAULT_VOCAB_PADDING_SIZE."""


def tensor_parallel_problems(option: str, tp: int, shape: ModelShape) -> Iterator[str]:
    """Why Megatron-Core 0.16.1 (parallel.tp) or vLLM 0.32.0 (rollout.tp) cannot cut the model."""
    near = nearest(tp, [n for n in divisors(shape.num_heads) if not any(_uncut(option, n, shape))])
    for reason in _uncut(option, tp, shape):
        yield f"{option}: {tp} {reason}; nearest that work: {listed(near)}"


def _uncut(option: str, tp: int, shape: ModelShape) -> Iterator[str]:
    heads, kv_heads, ffn = shape.num_heads, shape.num_kv_heads, shape.ffn
    rows = (heads + 2 * kv_heads) * shape.head_dim
    vocab = padded_vocab(shape.vocab, multiple=VOCAB_PADDING, tp=1)
    if not divides(tp, heads):
        yield f"does not divide the model's {heads} attention heads"
    if not divides(tp, kv_heads) and not divides(kv_heads, tp):
        yield f"neither divides nor is a multiple of the model's {kv_heads} key-value heads"
    elif option == "parallel.tp" and divides(tp, heads) and not divides(tp, rows):
        yield (
            f"does not divide the model's {rows} rows of query, key and value "
            f"({heads} + 2 * {kv_heads} heads of {shape.head_dim}), which Megatron-Core cuts evenly"
        )
    if not divides(tp, ffn):
        yield f"does not divide the model's {ffn} feed-forward units"
    if option == "rollout.tp" and not divides(tp, vocab):
        yield f"does not divide the {vocab} rows to which vLLM pads the vocabulary of {shape.vocab}"


def divisors(number: int) -> tuple[int, ...]:
    """Positive divisors, ascending; none for numbers below 1."""
    small = [n for n in range(1, math.isqrt(max(number, 0)) + 1) if number % n == 0]
    return tuple(sorted({*small, *(number // n for n in small)}))


def nearest(wanted: int, allowed: Iterable[int]) -> tuple[int, ...]:
    """The neighbours of `wanted` in `allowed`: the closest below (or equal) and above."""
    values = sorted(allowed)
    below = [value for value in values if value <= wanted]
    above = [value for value in values if value > wanted]
    return (*below[-1:], *above[:1])


def divides(part: int, whole: int) -> bool:
    """True also where a size is below 1: that is its own problem, reported once."""
    return part < 1 or whole < 1 or whole % part == 0


def listed(values: Iterable[int]) -> str:
    """For a message."""
    return ", ".join(str(value) for value in values)

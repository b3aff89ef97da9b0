"""What can be measured: sizes, layouts, and whom the loss is held against."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final, Literal

import torch

Baseline = Literal["megatron", "torch", "liger"]
BASELINES: Final[tuple[Baseline, ...]] = ("megatron", "torch", "liger")
Dtype = Literal["fp32", "bf16"]

VOCAB: Final = 151_936
"""Of Qwen3; Qwen2.5-Math-7B has 128 rows more."""
TOKENS: Final = (1024, 8192)
MORE_TOKENS: Final = (1024, 4096, 8192)
HIDDEN: Final = (896,)
MORE_HIDDEN: Final = (896, 3584)
LONG: Final = 2048
"""Tokens. A pass over more takes a minute on a CPU core, and is timed less often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One size on one layout."""

    num_tokens: int
    vocab: int
    hidden: int
    tp: int
    dtype: Dtype
    rounds: int
    """Passes of each way."""
    baselines: tuple[Baseline, ...]

    def __post_init__(self) -> None:
        if self.vocab % self.tp:
            # Megatron's loss would take padding for vocabulary.
            raise ValueError(
                f"found a vocabulary of {self.vocab} over {self.tp} ranks, expected a multiple; "
                "change --vocab or --tp"
            )


def make_cases(
    *,
    tokens: Sequence[int] | None,
    hidden: Sequence[int] | None,
    tps: Sequence[int],
    vocab: int,
    dtype: Dtype | None,
    rounds: int | None,
    baselines: Sequence[Baseline] | None,
    full: bool,
) -> list[Case]:
    """Every combination that this machine can run; None: all, or what suits the device.

    Raises ValueError if the ranks cannot share the vocabulary, or nothing is left to measure.
    """
    cuda = torch.cuda.is_available()
    tokens = tokens or (MORE_TOKENS if cuda or full else TOKENS)
    hidden = hidden or (MORE_HIDDEN if cuda or full else HIDDEN)
    cases = [
        Case(
            num_tokens=num_tokens,
            vocab=vocab,
            hidden=size,
            tp=tp,
            dtype=dtype or ("bf16" if cuda else "fp32"),
            rounds=rounds or _rounds(num_tokens, cuda=cuda),
            baselines=against,
        )
        for size, tp, num_tokens in product(hidden, tps, tokens)
        if (against := tuple(at for at in _usable(tp) if at in (baselines or BASELINES)))
    ]
    if not cases:
        raise ValueError(
            f"found nothing to measure with --tp {tps} --baselines {baselines}; only megatron has "
            "tp above 1, liger needs CUDA and liger_kernel, and every rank its own GPU, if any"
        )
    return cases


def left_out(tps: Sequence[int]) -> list[str]:
    """What is not measured on this machine, and why."""
    if not torch.cuda.is_available():
        return ["liger: not measured, it needs CUDA"]
    num_devices = torch.cuda.device_count()
    found = [f"tp {tp}: not measured, {num_devices} GPUs" for tp in tps if tp > num_devices]
    if not _liger_installed():
        found.append("liger: not measured, liger_kernel is not installed")
    return found


def _usable(tp: int) -> tuple[Baseline, ...]:
    """What can run here; only Megatron's shards the vocabulary."""
    cuda = torch.cuda.is_available()
    if cuda and tp > torch.cuda.device_count():
        return ()
    if tp > 1:
        return ("megatron",)
    return ("megatron", "torch", "liger") if cuda and _liger_installed() else ("megatron", "torch")


def _rounds(num_tokens: int, *, cuda: bool) -> int:
    if cuda:
        return 15
    return 2 if num_tokens > LONG else 3


def _liger_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None

"""Which implementation serves each part of the actor, and why; one table for people."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
from megatron.core.optimizer import Adam


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One part of the actor and what computes it."""

    part: str
    choice: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """What of this machine the choice depends on."""

    cuda: bool
    """A CUDA device is there."""
    transformer_engine: bool
    adam: str
    """Package whose Adam Megatron-Core took: transformer_engine, apex or torch."""


def installed() -> Installed:
    """What Megatron-Core found here, and could import."""
    return Installed(
        cuda=torch.cuda.is_available(),
        transformer_engine=HAVE_TE,
        adam=Adam.__module__.split(".")[0],
    )


def uses_transformer_engine() -> bool:
    """True where layers are Transformer Engine's: installed, and a CUDA device to run it on."""
    found = installed()
    return found.cuda and found.transformer_engine


def fuses_weight_gradient() -> bool:
    """True where the output layer's weight gradient is formed by apex's kernel."""
    return (
        uses_transformer_engine()
        and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    )


def kernels_in_use(found: Installed) -> list[Kernel]:
    """The table that is printed at start; pure."""
    engine = found.cuda and found.transformer_engine
    if engine:
        why = "installed, with a CUDA device"
    elif found.cuda:
        why = "transformer_engine is not installed"
    else:
        why = "no CUDA device"

    def choose(part: str, fused: str, plain: str) -> Kernel:
        return Kernel(part=part, choice=fused if engine else plain, why=why)

    return [
        choose("linear layers", "Transformer Engine", "torch, Megatron-Core tensor parallel"),
        choose("attention", "Transformer Engine", "torch scaled_dot_product_attention"),
        choose("norms", "Transformer Engine, fused with the product", "torch rms_norm"),
        choose("rope", "Transformer Engine, fused", "torch, Megatron-Core"),
        _adam(found),
        Kernel(
            part="cross-entropy",
            choice="torch, chunked over tokens, vocab-parallel",
            why="two temperatures and the entropy in one pass",
        ),
    ]


def kernel_lines(kernels: Sequence[Kernel]) -> list[str]:
    """The table as lines of text: part, what computes it, why."""
    parts = max(len(kernel.part) for kernel in kernels)
    choices = max(len(kernel.choice) for kernel in kernels)
    return [
        f"  {kernel.part:<{parts}}  {kernel.choice:<{choices}}  {kernel.why}" for kernel in kernels
    ]


def _adam(found: Installed) -> Kernel:
    names = {
        "transformer_engine": "Transformer Engine FusedAdam",
        "apex": "apex FusedAdam",
        "torch": "torch AdamW, fused",
    }
    if found.adam == "torch":
        why = "neither transformer_engine nor apex is installed"
    else:
        why = "the first that Megatron-Core finds of Transformer Engine, apex, torch"
    return Kernel(part="adam", choice=names.get(found.adam, found.adam), why=why)

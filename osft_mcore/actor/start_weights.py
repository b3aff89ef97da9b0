"""The weights that a run starts from, and those that its KL penalty measures from."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from osft_mcore.config.model_shape import ModelShape
from osft_mcore.config.schema import AlgorithmConfig, ModelConfig
from osft_mcore.weights.fill import filled, random_into, random_tensor
from osft_mcore.weights.layout import Layout
from osft_mcore.weights.params import hf_layouts, hf_tensors
from osft_mcore.weights.safetensors_io import HfSource, load_into


def reference_source(model: ModelConfig, algorithm: AlgorithmConfig) -> ModelConfig:
    """Where the reference model comes from: algorithm.reference, or where the run starts."""
    if not algorithm.reference:
        return model
    return replace(model, path=algorithm.reference, init="pretrained")


def load_start_weights(
    params: Mapping[str, Tensor],
    layout: Mapping[str, Layout],
    shape: ModelShape,
    model: ModelConfig,
    *,
    seed: int,
) -> None:
    """Fill this rank's `params` from model.path, or at random from `seed`. Not collective."""
    if model.init == "random":
        random_into(params, layout, shape, seed)
    else:
        load_into(params, layout, model.path)


def start_tensors(
    shape: ModelShape, model: ModelConfig, *, dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """The same weights as whole Hugging Face tensors, each new and on the CPU."""
    if model.init == "random":
        for name, size in hf_tensors(shape).items():
            yield name, random_tensor(name, size, seed, shape.init_std).to(dtype)
        return
    source = HfSource(model.path)
    yield from filled(hf_layouts(shape), source.layouts, source.rows, dtype=lambda _: dtype)

"""The weights that a run starts from, and those that its KL penalty measures from."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from osft_mcore.config.model_shape import ModelShape
from osft_mcore.config.schema import AlgorithmConfig, ModelConfig
from osft_mcore.weights.fill import random_into
from osft_mcore.weights.layout import Layout
from osft_mcore.weights.safetensors_io import load_into


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

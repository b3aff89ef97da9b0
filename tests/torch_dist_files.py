"""Small torch_dist checkpoints of random tensors, without Megatron-Core."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from layouts import Tensors, model, random_checkpoint

from osft_mcore.checkpoint.torch_dist_reader import TorchDistSource
from osft_mcore.checkpoint.torch_dist_writer import write_torch_dist
from osft_mcore.config.model_shape import ModelShape
from osft_mcore.weights.fill import filled
from osft_mcore.weights.layout import Layouts
from osft_mcore.weights.params import hf_layouts
from osft_mcore.weights.plan import Copy

SHAPE = model("qwen2", kv_heads=2)


class DictSource:
    """Tensors in a dict as a `WeightSource`."""

    def __init__(self, shape: ModelShape, tensors: Tensors) -> None:
        self.tensors = tensors
        self.layouts: Layouts = {0: hf_layouts(shape)}

    def dtype(self, _shard: int, param: str) -> torch.dtype:
        return self.tensors[param].dtype

    def rows(self, copy: Copy) -> torch.Tensor:
        return self.tensors[copy.src_param].narrow(copy.dim, copy.src_start, copy.length)


def written(
    folder: Path,
    shape: ModelShape = SHAPE,
    tensors: Tensors | None = None,
    *,
    tp: int = 1,
    pp: int = 1,
    vocab_multiple: int = 8,
    dtype: torch.dtype | None = None,
    transformer_engine: bool = True,
    note: Callable[[str, int], None] = lambda _key, _num_bytes: None,
) -> list[str]:
    """Write random tensors, or those given, into a new folder."""
    folder.mkdir()
    return write_torch_dist(
        folder,
        DictSource(shape, random_checkpoint(shape) if tensors is None else tensors),
        shape,
        tp=tp,
        pp=pp,
        vocab_multiple=vocab_multiple,
        dtype=dtype,
        transformer_engine=transformer_engine,
        note=note,
    )


def read(folder: Path, shape: ModelShape = SHAPE) -> Tensors:
    """Every Hugging Face tensor of a checkpoint."""
    source = TorchDistSource(folder, shape)
    dtype = source.dtype(0, "decoder.final_layernorm.weight")
    layouts = hf_layouts(shape)
    return dict(filled(layouts, source.layouts, source.rows, dtype=lambda _name: dtype))


def change(folder: Path, edit: Callable[[Any], None]) -> None:
    """Edit the metadata, as torch sees it, in place."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))

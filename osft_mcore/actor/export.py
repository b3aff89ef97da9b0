"""Writes the actor's weights as a Hugging Face folder that transformers and vLLM load."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from osft_mcore.actor.actor import Actor
from osft_mcore.weights.params import hf_layouts
from osft_mcore.weights.safetensors_io import save_hf
from osft_mcore.weights.stream import make_portions, stream_tensors

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def export_hf(actor: Actor, folder: str | Path, *, max_shard_bytes: int, bucket_bytes: int) -> None:
    """Write `folder` as a whole: it appears under its name when every file is complete.

    Every rank must call; rank 0 writes and holds at most one shard of the model at a time.
    """
    target = Path(folder)
    building = target.with_name(target.name + ".tmp")
    tensors = _gather(actor, max_shard_bytes=max_shard_bytes, bucket_bytes=bucket_bytes)
    if actor.context.rank != 0:
        for _ in tensors:
            pass
        return
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    save_hf(building, tensors, shape=actor.shape, max_shard_bytes=max_shard_bytes)
    _copy_side_files(Path(actor.model.path), building, dtype=actor.dtype)
    if target.exists():
        shutil.rmtree(target)
    os.replace(building, target)


def _gather(
    actor: Actor, *, max_shard_bytes: int, bucket_bytes: int
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the checkpoint, whole, on rank 0; the others only take part."""
    context = actor.context
    portions = make_portions(
        actor.layouts,
        hf_layouts(actor.shape),
        receivers=[0],
        rank=context.rank,
        dtype=actor.dtype,
        portion_bytes=max_shard_bytes,
        bucket_bytes=bucket_bytes,
    )
    for name, tensor in stream_tensors(
        portions,
        actor.parameters(),
        verify="off",
        turn=0,
        group=context.world_group,
        device=context.device,
    ):
        yield name, tensor.cpu()


def _copy_side_files(source: Path, target: Path, *, dtype: torch.dtype) -> None:
    """Tokenizer, generation config, chat template: everything of the base model but weights."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(WEIGHT_FILES) and path.name != "config.json":
            shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

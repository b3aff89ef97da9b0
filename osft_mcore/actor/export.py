"""Writes the actor's weights as a Hugging Face folder that transformers and vLLM load."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from osft_mcore.actor.actor import Actor
from osft_mcore.checkpoint.manifest import write_manifest
from osft_mcore.files import flush, write_file
from osft_mcore.weights.hf_writer import save_hf
from osft_mcore.weights.params import hf_layouts
from osft_mcore.weights.side_files import CARD, read_side_files
from osft_mcore.weights.stream import make_portions, stream_tensors


def export_hf(
    actor: Actor,
    folder: str | Path,
    *,
    max_shard_bytes: int,
    bucket_bytes: int,
    card: str | None = None,
) -> None:
    """Write `folder` as a whole: it appears under its name when every file is complete.

    `card` becomes README.md; the base model's own is BASE_MODEL_README.md. Every rank must call;
    rank 0 writes, and holds at most `max_shard_bytes` of tensors at a time, or the largest one. It
    raises OSError if the folder cannot be written, and leaves nothing of it; the others return.
    """
    target = Path(folder)
    building = target.with_name(target.name + ".tmp")
    tensors = _gather(actor, max_shard_bytes=max_shard_bytes, bucket_bytes=bucket_bytes)
    if actor.context.rank != 0:
        for _ in tensors:
            pass
        return
    try:
        _write(actor, building, tensors, max_shard_bytes=max_shard_bytes, card=card)
        if target.exists():
            shutil.rmtree(target)
        os.replace(building, target)
        flush(target.parent)
    except OSError:
        shutil.rmtree(building, ignore_errors=True)
        # The others are in the middle of sending, and would wait for this rank.
        for _ in tensors:
            pass
        raise


def _write(
    actor: Actor,
    building: Path,
    tensors: Iterator[tuple[str, Tensor]],
    *,
    max_shard_bytes: int,
    card: str | None,
) -> None:
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    files = save_hf(
        building,
        tensors,
        shape=actor.shape,
        dtype=actor.dtype,
        max_shard_bytes=max_shard_bytes,
    )
    contents = read_side_files(actor.model.path, dtype=actor.dtype, derived=True)
    if card is not None:
        contents[CARD] = card.encode()
    for name, content in contents.items():
        path = building / name
        path.parent.mkdir(exist_ok=True)
        files[name] = write_file(path, [content])
        flush(path.parent)
    write_manifest(building, files, {})


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

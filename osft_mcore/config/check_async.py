"""What of the options on asynchronous evaluation cannot work."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from osft_mcore.config.evaluation import cores, gpus
from osft_mcore.config.schema import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What this process may use of the machine that it runs on."""

    cores: frozenset[int]
    """Numbers of the CPU cores."""
    gpus: tuple[str, ...]
    """GPUs that ranks on this machine take, one each, as CUDA_VISIBLE_DEVICES names them."""
    num_ranks: int | None
    """On this machine; None: all of the run."""


def async_problems(config: RunConfig, device: str, host: Host | None) -> Iterator[str]:
    """Of a run that trains. `host` None: what there is to compute on is not looked at."""
    evaluation = config.evaluation
    if evaluation.mode == "inline":
        for option, given in (("devices", evaluation.devices), ("snapshots", evaluation.snapshots)):
            if given:
                yield f"evaluation.{option}: it is for evaluation.mode=async; set that or drop it"
        return
    if not evaluation.files:
        yield (
            "evaluation.mode: found async, but evaluation.files is empty; name the files or set "
            "evaluation.mode=inline"
        )
    if evaluation.snapshots and not Path(evaluation.snapshots).is_absolute():
        yield (
            f"evaluation.snapshots: found {evaluation.snapshots!r}, expected an absolute path, "
            "such as /dev/shm, or nothing for a folder in output_dir"
        )
    elif evaluation.snapshots and host is not None:
        yield from _snapshots(evaluation.snapshots)
    yield from _gpus(config, host) if device == "cuda" else _cores(config, host)


def _snapshots(folder: str) -> Iterator[str]:
    if not Path(folder).is_dir():
        yield f"evaluation.snapshots: {folder!r} is not a folder; expected one to use"
        return
    try:
        # Permissions alone do not tell: a file system may be read-only, full, or of another host.
        with tempfile.TemporaryDirectory(prefix="osft-", dir=folder):
            pass
    except OSError as error:
        yield (
            f"evaluation.snapshots: {folder!r} cannot be written: {error.strerror}; expected a "
            "folder in which this user may make others, or nothing for one in output_dir"
        )


def _gpus(config: RunConfig, host: Host | None) -> Iterator[str]:
    named, tp = gpus(config.evaluation.devices), config.rollout.tp
    found = f"evaluation.devices: found {config.evaluation.devices!r}"
    if not all(named) or len(set(named)) != len(named):
        yield f"{found}, expected different GPUs with commas between them, as in 6,7"
    elif len(named) != tp:
        yield (
            f"{found}, expected as many GPUs as rollout.tp = {tp}, for the process of "
            "evaluation.mode=async, and none of those that the ranks use"
        )
    taken: tuple[str, ...] = ()
    if host is not None:
        num_ranks = config.parallel.world_size if host.num_ranks is None else host.num_ranks
        taken = host.gpus[:num_ranks]
    if shared := [name for name in named if name in taken]:
        yield (
            f"{found}, but ranks of this run use {', '.join(shared)} (they take the first ones of "
            "CUDA_VISIBLE_DEVICES); name others, or start fewer ranks"
        )


def _cores(config: RunConfig, host: Host | None) -> Iterator[str]:
    try:
        named = cores(config.evaluation.devices)
    except ValueError as error:
        yield f"evaluation.devices: {error}"
        return
    if absent := sorted(set(named) - (host.cores if host is not None else set(named))):
        yield (
            f"evaluation.devices: found {config.evaluation.devices!r}, but this process may not "
            f"use the CPU cores {', '.join(map(str, absent))}; there are "
            f"{', '.join(map(str, sorted(host.cores if host else ())))}"
        )

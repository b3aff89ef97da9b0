"""What the launcher announced to this process; read here and nowhere else."""

import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Collection, Mapping
from typing import Final, Literal

from osft_mcore.errors import ConfigError

OWN_RUN_ID: Final = "osft-launcher"
"""Run id in the ranks that `launch` starts, under the name that torchrun uses for its own."""

PROGRAM_START: Final = time.time()
"""Seconds since the epoch: this file is among the first to be imported."""

STARTED: Final = "OSFT_STARTED"
"""Since when what is asked of this run is meant for it, in seconds since the epoch: from whoever
starts the ranks, perhaps for a second time."""

PARENT: Final = "OSFT_PARENT"
"""Process id of whoever started this process and wants it to end with itself."""

_PLACE: Final = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_RENDEZVOUS: Final = ("MASTER_ADDR", "MASTER_PORT")
_MORE_OF_TORCHRUN: Final = (
    "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE",
    "ROLE_NAME",
)  # fmt: skip


def check_launch_environment() -> None:
    """Raise ConfigError if a launcher announced only part of this process's place.

    All variables absent: no launcher. MASTER_ADDR and MASTER_PORT alone are no launcher either;
    clusters export them to every job.
    """
    job_end()
    run_start()
    found = {name: os.environ[name] for name in (*_PLACE, *_RENDEZVOUS) if os.environ.get(name)}
    if not found.keys() & set(_PLACE):
        return
    absent = [name for name in (*_PLACE, *_RENDEZVOUS) if name not in found]
    problems = []
    if absent:
        problems.append(
            f"{', '.join(absent)}: not set, but {', '.join(sorted(found))} set in the environment; "
            "a launcher (torchrun) sets all five; unset them to start the ranks from here"
        )
    numbers = {}
    for name in (*_PLACE, "MASTER_PORT"):
        if name in found:
            if found[name].isdecimal():
                numbers[name] = int(found[name])
            else:
                problems.append(f"{name}: found {found[name]!r}, expected a number of 0 or more")
    rank, world_size = numbers.get("RANK"), numbers.get("WORLD_SIZE")
    if rank is not None and world_size is not None and rank >= world_size:
        problems.append(f"RANK: found {rank}, expected less than WORLD_SIZE = {world_size}")
    if problems:
        raise ConfigError(problems)


def check_started_once(environ: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError if srun has started this program several times, and no launcher is between.

    Each of them would start all ranks.
    """
    # What the step has; SLURM_NTASKS is the job's, and its script is started once.
    num_tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    if not environ.get("RANK") and num_tasks.isdecimal() and int(num_tasks) > 1:
        raise ConfigError(
            f"SLURM_STEP_NUM_TASKS: found {num_tasks}: srun starts this program {num_tasks} times, "
            "and each would start all ranks; let it start one torchrun a node, as "
            "examples/slurm/train.sbatch does, or one task (srun --ntasks 1); unset the variable "
            "if every task is a run of its own"
        )


def launched_world_size() -> int | None:
    """World size that torchrun announced; None outside a launcher."""
    value = os.environ.get("WORLD_SIZE")
    return int(value) if value else None


def launched_rank() -> int:
    """Global rank that the launcher announced; 0 outside a launcher."""
    return int(os.environ.get("RANK") or 0)


def local_world_size() -> int:
    """Number of ranks on this host; the whole world if the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or "1")


def local_rank() -> int:
    """Rank on this host; 0 where the launcher's value is no number, so that rank may say so."""
    value = os.environ.get("LOCAL_RANK", "")
    return int(value) if value.isdecimal() else 0


def started_by_own_launcher() -> bool:
    """True in the ranks that `launch` started: what it checked needs no second look."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == OWN_RUN_ID


def started_by_torchrun() -> bool:
    """True in the ranks of an elastic agent, which may start them again."""
    return bool(os.environ.get("TORCHELASTIC_RUN_ID")) and not started_by_own_launcher()


def launcher_keeps_store() -> bool:
    """True if the store at MASTER_ADDR outlives the ranks; else rank 0 has it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def job_id(environ: Mapping[str, str] = os.environ) -> str | None:
    """The Slurm job that this process belongs to; a job that is requeued keeps its id."""
    return environ.get("SLURM_JOB_ID") or None


def job_attempt(environ: Mapping[str, str] = os.environ) -> str:
    """How often Slurm has started that job again; empty if it has not."""
    return environ.get("SLURM_RESTART_COUNT", "")


def job_end(environ: Mapping[str, str] = os.environ) -> float | None:
    """When Slurm ends the job, in seconds since the epoch; None: no job, or none that ends.

    Raises ConfigError if that is no time.
    """
    return _time("SLURM_JOB_END_TIME", environ, setter="Slurm")


def run_start(environ: Mapping[str, str] = os.environ) -> float:
    """When a person or a job started this run, its ranks perhaps later. Raises as `job_end`."""
    announced = _time(STARTED, environ, setter="your job script")
    return PROGRAM_START if announced is None else min(announced, PROGRAM_START)


def knows_run_start(environ: Mapping[str, str] = os.environ) -> bool:
    """False in ranks that torchrun has started again, if nobody says when it started the first."""
    restarts = environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return bool(environ.get(STARTED)) or restarts in ("", "0")


def _time(name: str, environ: Mapping[str, str], *, setter: str) -> float | None:
    text = environ.get(name)
    if not text:
        return None
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ConfigError(
            f"{name}: found {text!r} in the environment, expected seconds since the epoch; unset "
            f"it if {setter} did not set it"
        )
    return found


def device_type() -> Literal["cpu", "cuda"]:
    """Where this process computes."""
    # Here, because everything else in this file is needed before a mistake can be reported.
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def end_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, however that ends (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.environ.get(PARENT) not in (None, str(os.getppid())):
        # It ended before the kernel was asked.
        os._exit(128 + signal.SIGKILL)


def variables_of_child(changes: Mapping[str, str]) -> dict[str, str]:
    """For a child that ends with this process, has a world of its own, and `changes`."""
    of_launchers = {*_PLACE, *_RENDEZVOUS, *_MORE_OF_TORCHRUN}
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in of_launchers and not name.startswith("TORCHELASTIC_")
    }
    return {**kept, **changes, PARENT: str(os.getpid())}


def started_by_a_run() -> bool:
    """True in processes that `variables_of_child` is for, and in what they start."""
    return PARENT in os.environ


def usable_cores() -> frozenset[int]:
    """CPU cores that this process may use."""
    return frozenset(os.sched_getaffinity(0))


def stay_on_cores(cores: Collection[int]) -> None:
    """Keep this process, and what it starts, on CPU cores; () leaves it where it may be."""
    if cores:
        os.sched_setaffinity(0, cores)


def visible_gpus(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The GPUs that ranks on this host take, the first first, named as the user names them."""
    import torch

    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return tuple(map(str, range(torch.cuda.device_count())))
    return tuple(name.strip() for name in named.split(","))

"""Run a function on several forked ranks over gloo, as torchrun would on one machine."""

import contextlib
import os
import pickle
import random
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RanksFailed(AssertionError):
    """At least one rank raised, died or ran out of time."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *,
    timeout_s: float = 240.0,
    lost: Collection[int] = (),
    **kwargs: Any,
) -> list[Any]:
    """Call `fn(rank, **kwargs)` on `world_size` forked processes; return their results by rank.

    Forked, so that modules imported by the test are there at once. The process group is set up
    before `fn` and torn down after it. Ranks in `lost` are meant to die or hang: their result is
    None, they are killed when the others have ended, and those leave the group by themselves.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        pids = {}
        for rank in range(world_size):
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                _child(fn, rank, world_size, port, Path(folder), kwargs)
            pids[pid] = rank
        problems = _wait(pids, Path(folder), timeout_s, lost)
        if problems:
            raise RanksFailed("\n".join(problems))
        return [
            None if rank in lost else _load(Path(folder) / f"result_{rank}")
            for rank in range(world_size)
        ]


def _load(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


def _child(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    folder: Path,
    kwargs: dict[str, Any],
) -> None:
    status = 1
    try:
        torch.set_num_threads(1)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        result = fn(rank, **kwargs)
        (folder / f"result_{rank}").write_bytes(pickle.dumps(result))
        if dist.is_initialized():
            # Rank 0 hosts the store: if it left first, the others' last calls would fail.
            dist.barrier()
        status = 0
    except BaseException:
        (folder / f"error_{rank}").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Skips interpreter shutdown: the parent's pytest must not run its teardown here.
        os._exit(status)


def _wait(pids: dict[int, int], folder: Path, timeout_s: float, lost: Collection[int]) -> list[str]:
    deadline, running, failed_at = time.monotonic() + timeout_s, dict(pids), None
    problems = []
    while any(rank not in lost for rank in running.values()):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            rank = running.pop(pid)
            if status != 0 and rank not in lost:
                error = folder / f"error_{rank}"
                text = error.read_text() if error.exists() else f"died with status {status}"
                problems.append(f"rank {rank}: {text}")
                failed_at = failed_at or time.monotonic()
            continue
        now = time.monotonic()
        if now > deadline or (failed_at and now > failed_at + 5):
            problems += [f"rank {rank}: still running, killed" for rank in running.values()]
            break
        time.sleep(0.01)
    for stuck in running:
        os.kill(stuck, 9)
        os.waitpid(stuck, 0)
    return problems


def _free_port() -> int:
    # Below those that the kernel hands out (from 32768 on), and apart from those of another worker
    # of pytest-xdist: else somebody may take it before rank 0 does.
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ours = range(10_000 + 5_000 * (worker % 4), 15_000 + 5_000 * (worker % 4))
    for port in random.sample(ours, 100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise RanksFailed(f"no free port among 100 of {ours}")

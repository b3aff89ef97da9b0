"""Starts the ranks of one case on this machine and brings back what they measured."""

import json
import os
import socket
import tempfile
from pathlib import Path

import torch
from torch import multiprocessing
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from osft_mcore.parallel.groups import parallel_context
from osft_mcore.parallel.world import end_with_parent
from sync_benchmark.cases import Case, write_model
from sync_benchmark.measure import measure
from sync_benchmark.quiet import silence_libraries
from sync_benchmark.rows import Row, as_json

TIMEOUT_MINUTES = 10.0


def run_case(case: Case) -> Row:
    """Measure one case on ranks of its own.

    Raises ProcessRaisedException with the traceback of a rank that failed.
    """
    # Forked ranks need not import vLLM again, which takes longer than all the rest; where there
    # is CUDA, a fork could not use it.
    how = "spawn" if torch.cuda.is_available() else "fork"
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), _free_port()
        write_model(folder, case.model)
        ranks = multiprocessing.start_processes(
            _run_rank,
            args=(case, port, folder),
            nprocs=case.topology.world_size,
            start_method=how,
            join=False,
        )
        # Here and not on rank 0, which would take the store along when it ends first. After the
        # fork: a rank would inherit locks that the store's threads hold at that moment.
        store = TCPStore("localhost", port, is_master=True, wait_for_workers=False)
        while not ranks.join():
            pass
        del store
        return Row(**json.loads(_result(folder).read_text(encoding="utf-8")))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def machine() -> str:
    """What the ranks run on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, NCCL"
    return f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} torch thread a rank, gloo"


def _run_rank(rank: int, case: Case, port: int, folder: Path) -> None:
    end_with_parent()
    world_size = case.topology.world_size
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        # What tells torch.distributed that the store is the launcher's.
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    # Standard output is for the table; libraries talk on their own terms.
    os.dup2(2, 1)
    silence_libraries()
    with parallel_context(case.topology, timeout_minutes=TIMEOUT_MINUTES) as context:
        row = measure(case, folder, context)
    if rank == 0:
        _result(folder).write_text(json.dumps(as_json(row)), encoding="utf-8")


def _result(folder: Path) -> Path:
    return folder / "row.json"

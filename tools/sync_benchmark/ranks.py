"""Starts the ranks of one case on this machine and brings back what they measured."""

import json
import tempfile
from pathlib import Path

import torch
from torch import multiprocessing

from osft_mcore.parallel.groups import parallel_context
from osft_mcore.parallel.loopback import loopback_store
from sync_benchmark.cases import Case, write_model
from sync_benchmark.measure import measure
from sync_benchmark.place import free_port, take_place
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
        folder, port = Path(name), free_port()
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
        store = loopback_store(port)
        while not ranks.join():
            pass
        del store
        return Row(**json.loads(_result(folder).read_text(encoding="utf-8")))


def _run_rank(rank: int, case: Case, port: int, folder: Path) -> None:
    take_place(rank, case.topology.world_size, port)
    with parallel_context(case.topology, timeout_minutes=TIMEOUT_MINUTES) as context:
        row = measure(case, folder, context)
    if rank == 0:
        _result(folder).write_text(json.dumps(as_json(row)), encoding="utf-8")


def _result(folder: Path) -> Path:
    return folder / "row.json"

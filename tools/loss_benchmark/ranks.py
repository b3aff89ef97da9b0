"""Runs a measurement on ranks of its own, on this machine, and brings back its result."""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from sync_benchmark.place import free_port, take_place
from torch import multiprocessing

from osft_mcore.parallel.groups import ParallelContext, parallel_context
from osft_mcore.parallel.loopback import loopback_store
from osft_mcore.parallel.topology import Topology

TIMEOUT_MINUTES: Final = 15.0
"""Of one measurement: long enough for any, short enough for a machine that began to swap."""

Measurement = Callable[[ParallelContext], Any]
"""Runs on every rank; what it returns goes into JSON. Can be pickled."""


def on_ranks(tp: int, measurement: Measurement) -> Any:
    """What `measurement` returns on rank 0 of `tp` new processes.

    Raises ProcessRaisedException with the traceback of a rank that failed, and TimeoutError.
    """
    # Forked ranks need not import Megatron again; where there is CUDA, a fork could not use it.
    how = "spawn" if torch.cuda.is_available() else "fork"
    with tempfile.TemporaryDirectory() as name:
        result, port = Path(name) / "result.json", free_port()
        ranks = multiprocessing.start_processes(  # type: ignore[attr-defined, no-untyped-call]
            _run_rank, args=(tp, port, measurement, result), nprocs=tp, start_method=how, join=False
        )
        # Here and not on rank 0, which would take the store along when it ends first. After the
        # fork: a rank would inherit locks that the store's threads hold at that moment.
        store = loopback_store(port)
        deadline = time.monotonic() + 60 * TIMEOUT_MINUTES
        while not ranks.join(timeout=1.0):
            if time.monotonic() > deadline:
                for process in ranks.processes:
                    process.kill()
                    process.join()
                raise TimeoutError(
                    f"found no result after {TIMEOUT_MINUTES:g} minutes; lower --tokens or "
                    "--hidden, or free the machine's memory and cores"
                )
        del store
        return json.loads(result.read_text(encoding="utf-8"))


def _run_rank(rank: int, tp: int, port: int, measurement: Measurement, result: Path) -> None:
    take_place(rank, tp, port)
    with parallel_context(Topology(tp=tp, pp=1, dp=1), timeout_minutes=TIMEOUT_MINUTES) as context:
        found = measurement(context)
    if rank == 0:
        result.write_text(json.dumps(found), encoding="utf-8")

"""Starts the ranks of a run on this machine, as `torchrun --standalone` would."""

import logging
import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def launch(arguments: Sequence[str], *, num_processes: int) -> int:
    """Run `python -m osft_mcore.cli *arguments` on `num_processes` ranks; returns the exit code.

    The ranks print their own errors, so the launcher adds none: its exit code is theirs.
    """
    # One thread per rank and core: ranks that compete for cores wait for each other.
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="osft",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "osft_mcore.cli", *arguments)
    except ChildFailedError as error:
        _rank, failure = error.get_first_failure()
        # A signal is reported as a negative code; shells say 128 + signal.
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0

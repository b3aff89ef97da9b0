"""What ranks of a benchmark on this machine need to know before they join each other."""

import os
import socket

import torch

from osft_mcore.parallel.loopback import LOOPBACK, ON_LOOPBACK
from osft_mcore.parallel.world import end_with_parent
from sync_benchmark.quiet import silence_libraries


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])


def take_place(rank: int, world_size: int, port: int) -> None:
    """Make this new process the `rank`-th of `world_size`, whose store is at `port`."""
    end_with_parent()
    os.environ.update(
        ON_LOOPBACK,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR=LOOPBACK,
        MASTER_PORT=str(port),
        # What tells torch.distributed that the store is the launcher's.
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    # Standard output is for the table; libraries talk on their own terms.
    os.dup2(2, 1)
    silence_libraries()


def machine() -> str:
    """What the ranks run on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, NCCL"
    return f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} torch thread a rank, gloo"

"""What ranks of one machine need to find each other without being found from outside."""

import socket
from types import MappingProxyType
from typing import Final

from torch.distributed import TCPStore  # type: ignore[attr-defined]

LOOPBACK: Final = "127.0.0.1"
ON_LOOPBACK: Final = MappingProxyType(
    {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": LOOPBACK}
)
"""Variables that keep the sockets of gloo, NCCL and vLLM on this machine (Linux). By themselves
they take the address that the host's name stands for, or the first network card."""


def loopback_store(port: int = 0) -> TCPStore:
    """The server of a store that only this machine can reach; port 0: any free one.

    Left to itself it listens on every address, whichever host it is given, and asks nobody who
    they are.
    """
    listener = socket.create_server((LOOPBACK, port), backlog=socket.SOMAXCONN)
    port = listener.getsockname()[1]
    # The store closes the descriptor.
    return TCPStore(
        LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )

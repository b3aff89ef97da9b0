"""What the network of this host must offer to the ranks, told before anything is built."""

import errno
import os
import socket
from collections.abc import Collection, Mapping
from typing import Final

from osft_mcore.errors import ConfigError
from osft_mcore.parallel.world import device_type, launched_world_size, local_world_size

GLOO: Final = "GLOO_SOCKET_IFNAME"
NCCL: Final = "NCCL_SOCKET_IFNAME"


def network_errors(environ: Mapping[str, str] = os.environ) -> list[ConfigError]:
    """What would keep the ranks of this host from finding the others."""
    interfaces = [name for _, name in socket.if_nameindex()]
    variables = (GLOO, NCCL) if device_type() == "cuda" else (GLOO,)
    problems = [
        interface_problem(variable, environ.get(variable, ""), interfaces) for variable in variables
    ]
    if (launched_world_size() or 1) > local_world_size():
        problems.append(reach_problem(environ.get(GLOO, ""), own_address(), interfaces))
    problems = [problem for problem in problems if problem]
    return [ConfigError(problems)] if problems else []


def interface_problem(variable: str, value: str, interfaces: Collection[str]) -> str:
    """Why a list of interfaces cannot be used on a host that has `interfaces`; empty if it can.

    GLOO_SOCKET_IFNAME lists names. NCCL_SOCKET_IFNAME lists beginnings of names, names after `=`;
    `^` before the list: those are not to be used.
    """
    excluded = variable == NCCL and value.startswith("^")
    text = value.removeprefix("^") if excluded else value
    exact = variable == GLOO or text.startswith("=")
    named = [name for name in text.removeprefix("=" if exact else "").split(",") if name]

    def found(name: str) -> list[str]:
        return [one for one in interfaces if one == name or (one.startswith(name) and not exact)]

    here = f"interfaces here: {', '.join(interfaces)}"
    if excluded:
        left = set(interfaces).difference(*map(found, named))
        return "" if left else f"{variable}: {value!r} leaves no interface of this host; {here}"
    # NCCL takes what there is of its list, gloo needs every one.
    lost = [name for name in named if not found(name)]
    if not lost or (variable == NCCL and lost != named):
        return ""
    return (
        f"{variable}: no interface {', '.join(lost)} on this host, {socket.gethostname()}; set it "
        f"to the one that leads to the other hosts, or unset it; {here}"
    )


def reach_problem(gloo: str, address: str, interfaces: Collection[str]) -> str:
    """Why ranks of other hosts could not reach those of this one; empty if they can.

    `gloo`: GLOO_SOCKET_IFNAME, empty if it is not set; `address`: what the host's name stands for.
    """
    if gloo or not is_loopback(address):
        # Whoever names the loopback interface has hosts that are one.
        return ""
    return (
        f"{GLOO}: not set, and this host's name, {socket.gethostname()}, stands for "
        f"{address or 'no address'}, where other hosts cannot reach it; set {GLOO} to the "
        f"interface that leads to them, or mend /etc/hosts; interfaces here: "
        f"{', '.join(interfaces)}"
    )


def own_address() -> str:
    """The address that this host's name stands for, as gloo takes it; empty if there is none."""
    return next((one for one in addresses(socket.gethostname()) if _is_here(one)), "")


def is_loopback(address: str) -> bool:
    """Without an address gloo takes that of the loopback interface, too."""
    return not address or address.startswith("127.") or address == "::1"


def check_meeting_point(endpoint: str) -> None:
    """Raise ConfigError if torchrun cannot meet at HOST:PORT.

    On that host the port must be free; on others no more is asked than that its name is known.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"meeting point: found {endpoint!r}, expected HOST:PORT")
    found = addresses(host.strip("[]"))
    if not found:
        raise ConfigError(
            f"meeting point: {socket.gethostname()} does not know the name {host}; give its "
            "address, or add it to /etc/hosts"
        )
    if any(map(_is_here, found)) and _in_use(int(port)):
        raise ConfigError(f"meeting point: {port_in_use(int(port))}")


def port_in_use(port: int) -> str:
    """What to say of it, on the host where it is so."""
    return (
        f"port {port} of {socket.gethostname()} is in use by another program, perhaps by an "
        "earlier start of this one; end that, or choose another port, on all hosts the same"
    )


def _in_use(port: int) -> bool:
    with socket.socket() as probe:
        # As torch's store does: what an ended program leaves behind does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def addresses(host: str) -> list[str]:
    """What a name stands for; nothing if it is not known."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        # UnicodeError: no name at all, as a..b.
        return []
    return [str(one[4][0]) for one in found]


def _is_here(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        # A kernel without IPv6 has not even the socket.
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True

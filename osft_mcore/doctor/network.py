"""Network interfaces, names and ports of this machine."""

import errno
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from osft_mcore.doctor.facts import Fabric, Interface, Port

LOOPBACK: Final = "127.0.0.1"
TORCHRUN_PORT: Final = "29500"
"""What torchrun takes when it is told no port."""
_GET_ADDRESS: Final = 0x8915
_GET_FLAGS: Final = 0x8913
_UP: Final = 0x1


def interfaces() -> tuple[Interface, ...]:
    """As the kernel orders them."""
    six = _addresses_v6(Path("/proc/net/if_inet6"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        return tuple(
            Interface(
                name=name,
                addresses=(*_address_v4(asked, name), *six.get(name, ())),
                up=_is_up(asked, name),
            )
            for _, name in socket.if_nameindex()
        )


def fabric(folder: Path = Path("/sys/class/infiniband")) -> tuple[Fabric, ...]:
    """Ports of InfiniBand and RoCE devices."""
    found = []
    with suppress(OSError):
        for state in sorted(folder.glob("*/ports/*/state")):
            name = f"{state.parts[-4]} port {state.parts[-2]}"
            found.append(Fabric(name=name, state=state.read_text().split(":")[-1].strip()))
    return tuple(found)


def ports(variables: Mapping[str, str], *, launched: bool) -> tuple[Port, ...]:
    """Those that ranks meet at. Of ranks that run MASTER_PORT is in use, as it should be."""
    found = [_port("any port", "0")]
    named = variables.get("MASTER_PORT", "")
    if launched:
        return tuple(found)
    if named:
        found.append(_port("MASTER_PORT", named))
    if named != TORCHRUN_PORT:
        found.append(_port("torchrun's usual port", TORCHRUN_PORT))
    return tuple(found)


def _port(what: str, text: str) -> Port:
    trouble = ""
    if not text.isdecimal() or int(text) >= 2**16:
        trouble = "expected a number from 1 to 65535"
    else:
        try:
            socket.create_server((LOOPBACK, int(text))).close()
        except OSError as error:
            trouble = os.strerror(error.errno or errno.EIO)
    return Port(what=what, text=text, trouble=trouble)


def _address_v4(asked: socket.socket, name: str) -> Iterator[str]:
    with suppress(OSError):
        answer = fcntl.ioctl(asked, _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
        yield socket.inet_ntoa(answer[20:24])


def _is_up(asked: socket.socket, name: str) -> bool:
    try:
        answer = fcntl.ioctl(asked, _GET_FLAGS, struct.pack("256s", name.encode()[:15]))
    except OSError:
        return False
    return bool(struct.unpack("H", answer[16:18])[0] & _UP)


def _addresses_v6(file: Path) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    with suppress(OSError):
        for line in file.read_text().splitlines():
            digits, *_, name = line.split()
            address = str(ipaddress.IPv6Address(int(digits, 16)))
            found[name] = (*found.get(name, ()), address)
    return found

"""Run a command and list what it and its children listen on; exit code 1 if beyond loopback."""

import argparse
import ipaddress
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def tree(root: int) -> list[int]:
    """Process ids: `root`, what it started, what that started, and so on."""
    pids = [root]
    for pid in pids:
        with suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
    return pids


def listening() -> Iterator[tuple[str, str, int]]:
    """Inode, address and port of every listening TCP socket of this network name space."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":
                    raw, port = fields[1].split(":")
                    # Words of 32 bits, as this machine keeps them.
                    words = [bytes.fromhex(raw[at : at + 8])[::-1] for at in range(0, len(raw), 8)]
                    yield fields[9], str(ipaddress.ip_address(b"".join(words))), int(port, 16)


def listeners(root: int) -> set[tuple[str, int, str]]:
    """Address, port and program of what the processes below `root` listen on now."""
    sockets = {f"socket:[{inode}]": (address, port) for inode, address, port in listening()}
    found = set()
    for pid in tree(root):
        with suppress(OSError):
            program = Path(f"/proc/{pid}/comm").read_text().strip()
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    if at := sockets.get(str(descriptor.readlink())):
                        found.add((*at, program))
    return found


def is_loopback(address: str) -> bool:
    """True for 127.0.0.0/8 and ::1, also as an IPv4 address inside an IPv6 one."""
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def main() -> int:
    """Run, poll, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=float, default=0.2, help="seconds between two looks")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if not args.command:
        parser.error("expected a command")
    seen: set[tuple[str, int, str]] = set()
    with subprocess.Popen(args.command) as process:
        while process.poll() is None:
            for address, port, program in sorted(listeners(process.pid) - seen):
                mark = "ok " if is_loopback(address) else "NOT"
                print(f"{mark} {address} port {port} {program}", file=sys.stderr, flush=True)
                seen.add((address, port, program))
            time.sleep(args.every)
    outside = sorted(
        f"{address} port {port}" for address, port, _ in seen if not is_loopback(address)
    )
    print(f"listened on {len(seen)} addresses, beyond loopback: {', '.join(outside) or 'none'}")
    return 1 if outside else process.returncode


if __name__ == "__main__":
    sys.exit(main())

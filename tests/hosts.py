"""Two hosts on this machine: namespaces of the kernel, with a network cable between them."""

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

CABLE = "cable"
"""The interface on both."""
HOLD = (
    """hostname "$0"; mount --bind "$1" /etc/hosts; ip link set lo up; echo up; exec sleep 3600"""
)
IN_FOLDER = 'cd "$0"; "$@"; exit $?'


class HostsRefused(RuntimeError):
    """The kernel makes no namespaces for this user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A name, an address, its own processes; the file system is shared."""

    name: str
    address: str
    holder: int
    """The process that keeps its namespaces."""

    def start(
        self, command: Sequence[str], folder: Path, log: Path, **variables: str
    ) -> "subprocess.Popen[bytes]":
        """Run a command there; killing it kills everything that it has started, at once."""
        inside = [
            *_enter(self.holder), "unshare", "--pid", "--fork", "--kill-child", "--mount-proc",
            "sh", "-c", IN_FOLDER, str(folder), *command,
        ]  # fmt: skip
        with log.open("wb") as out:
            return subprocess.Popen(
                inside,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | variables,
            )

    def plug(self, *, cable: bool) -> None:
        """Without the cable nothing leaves or reaches it, not even the end of a connection."""
        _run([*_enter(self.holder), "ip", "link", "set", CABLE, "up" if cable else "down"])


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """`host-a` and `host-b`, which know each other by name.

    Raises HostsRefused, with what the kernel said.
    """
    names = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}
    known = folder / "hosts"
    lines = [f"{address} {name}\n" for name, address in names.items()]
    known.write_text("127.0.0.1 localhost\n" + "".join(lines))
    with ExitStack() as stack:
        hosts = []
        for name, address in names.items():
            holder = stack.enter_context(_held(name, known))
            hosts.append(Host(name=name, address=address, holder=holder))
        first, second = hosts
        # In namespaces of their own from the beginning: nothing is left on this machine.
        ends = ["netns", str(first.holder), "type", "veth", "peer", "name", CABLE, "netns"]
        _run(["ip", "link", "add", CABLE, *ends, str(second.holder)])
        for host in hosts:
            enter = _enter(host.holder)
            _run([*enter, "ip", "address", "add", f"{host.address}/24", "dev", CABLE])
            host.plug(cable=True)
        yield first, second


@contextmanager
def _held(name: str, known: Path) -> Iterator[int]:
    command = ["unshare", "--net", "--uts", "--mount", "sh", "-ec", HOLD, name, str(known)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert holder.stdout is not None, "stdout was asked to be a pipe"
    assert holder.stderr is not None, "stderr was asked to be a pipe"
    try:
        if holder.stdout.readline() != "up\n":
            raise HostsRefused(holder.stderr.read().strip())
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
        holder.stderr.close()


def _enter(holder: int) -> list[str]:
    return ["nsenter", "--target", str(holder), "--net", "--uts", "--mount"]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostsRefused(done.stderr.strip())


def wait_for(log: Path, *texts: str, timeout_s: float) -> float:
    """When one of the texts was there, by the monotonic clock; fails with the log if none came."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        written = log.read_text(errors="replace")
        if any(text in written for text in texts):
            return time.monotonic()
        time.sleep(0.02)
    raise AssertionError(f"none of {texts} after {timeout_s:g} s in:\n{written[-4000:]}")


def ended(process: "subprocess.Popen[bytes]", log: Path, *, timeout_s: float) -> int:
    """Its exit code; fails with the log if there is none in time."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        written = log.read_text(errors="replace")
        raise AssertionError(f"still runs after {timeout_s:g} s:\n{written[-4000:]}") from None

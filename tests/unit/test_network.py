"""Interfaces, host names and ports that ranks on several hosts would stumble over."""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from osft_mcore.errors import ConfigError
from osft_mcore.parallel import network
from osft_mcore.parallel.network import (
    check_meeting_point,
    interface_problem,
    is_loopback,
    network_errors,
)

INTERFACES = ("lo", "eth0", "ib0", "ib1")
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "multi_node_torchrun.sh"


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of this host that another program listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("variable", "value", "lost"),
    [
        ("GLOO_SOCKET_IFNAME", "", ""),
        ("GLOO_SOCKET_IFNAME", "ib0", ""),
        ("GLOO_SOCKET_IFNAME", "ib0,eth0", ""),
        ("GLOO_SOCKET_IFNAME", "ib", "no interface ib on this host"),
        ("GLOO_SOCKET_IFNAME", "ib0,eth1", "no interface eth1 on this host"),
        ("NCCL_SOCKET_IFNAME", "ib", ""),
        ("NCCL_SOCKET_IFNAME", "eth1,ib", ""),
        ("NCCL_SOCKET_IFNAME", "en,wl", "no interface en, wl on this host"),
        ("NCCL_SOCKET_IFNAME", "=ib0", ""),
        ("NCCL_SOCKET_IFNAME", "=ib", "no interface ib on this host"),
        ("NCCL_SOCKET_IFNAME", "^lo,docker", ""),
        ("NCCL_SOCKET_IFNAME", "^lo,eth,ib", "leaves no interface"),
        ("NCCL_SOCKET_IFNAME", "^=lo,eth,ib", ""),
    ],
)
def test_an_interface_that_is_not_there_is_named(variable: str, value: str, lost: str) -> None:
    problem = interface_problem(variable, value, INTERFACES)
    assert bool(problem) == bool(lost)
    if lost:
        assert problem.startswith(f"{variable}: ")
        assert lost in problem
        assert problem.endswith("interfaces here: lo, eth0, ib0, ib1")


@pytest.mark.parametrize(
    ("address", "local", "named", "refused"),
    [
        ("127.0.1.1", "1", "", "stands for 127.0.1.1, where other hosts cannot reach it"),
        ("", "1", "", "stands for no address, where other hosts cannot reach it"),
        ("127.0.1.1", "2", "", ""),
        ("127.0.1.1", "1", "lo", ""),
        ("10.0.0.1", "1", "", ""),
    ],
)
def test_a_host_that_knows_itself_as_loopback_only(
    address: str, local: str, named: str, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setattr(network, "own_address", lambda: address)
    found = network_errors({"GLOO_SOCKET_IFNAME": named} if named else {})
    assert [refused in str(error) for error in found] == ([True] if refused else [])


def test_what_is_loopback() -> None:
    assert [is_loopback(a) for a in ("127.0.0.1", "::1", "", "10.0.0.1", "fe80::1")] == [
        True, True, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("endpoint", "told"),
    [
        ("localhost", "found 'localhost', expected HOST:PORT"),
        ("localhost:0", "expected HOST:PORT"),
        (":29500", "expected HOST:PORT"),
        ("no-such-host.invalid:29500", "does not know the name no-such-host.invalid"),
        ("a..b:29500", "does not know the name a..b"),
    ],
)
def test_a_meeting_point_that_is_none(endpoint: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_meeting_point(endpoint)


def test_a_meeting_point_must_be_free_where_it_is(taken: int) -> None:
    with pytest.raises(ConfigError, match=f"port {taken} of .* is in use by another program"):
        check_meeting_point(f"localhost:{taken}")
    # Of documentation, so of no host: what listens there this host cannot know.
    check_meeting_point(f"192.0.2.1:{taken}")


def test_a_meeting_point_with_an_address_of_a_protocol_that_this_kernel_lacks(
    taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_ipv6(family: int = socket.AF_INET, *rest: int, **named: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, *rest, **named)

    real = socket.socket
    both = [(0, 0, 0, "", (address, 0)) for address in ("2001:db8::1", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    monkeypatch.setattr(socket, "socket", without_ipv6)
    with pytest.raises(ConfigError, match="is in use by another program"):
        check_meeting_point(f"node-a:{taken}")


def test_the_script_refuses_a_port_that_is_in_use(taken: int) -> None:
    done = subprocess.run(
        ["bash", SCRIPT, "2", f"localhost:{taken}", "output_dir=never"],
        env={**os.environ, "OSFT_PYTHON": sys.executable, "PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("osft: ConfigError\n  - meeting point: port ")
    assert "or choose another port, on all hosts the same" in done.stderr

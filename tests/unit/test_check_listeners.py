"""The tool that tells what a command listens on, with commands that listen."""

import subprocess
import sys
from pathlib import Path

import pytest
from check_listeners import is_loopback

TOOL = Path(__file__).parents[2] / "tools" / "check_listeners.py"
LISTEN = "import socket, time\ns = socket.create_server(({host!r}, 0), family=socket.{family})\n"
WAIT = "time.sleep(0.5)\nraise SystemExit({code})\n"
CHILD = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', {program!r}])\n"


def checked(program: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(TOOL), "--every", "0.05", sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("host", "family"), [("0.0.0.0", "AF_INET"), ("::", "AF_INET6"), ("", "AF_INET")]
)
def test_every_address_is_beyond_loopback(host: str, family: str) -> None:
    done = checked(LISTEN.format(host=host, family=family) + WAIT.format(code=0))
    assert done.returncode == 1
    assert f"NOT {'::' if family == 'AF_INET6' else '0.0.0.0'} port " in done.stderr
    assert "listened on 1 addresses, beyond loopback: " in done.stdout


def test_a_child_is_seen_and_the_command_keeps_its_exit_code() -> None:
    local = LISTEN.format(host="127.0.0.1", family="AF_INET") + WAIT.format(code=0)
    done = checked(CHILD.format(program=local) + "sys.exit(5)")
    assert done.returncode == 5
    assert done.stdout == "listened on 1 addresses, beyond loopback: none\n"
    assert done.stderr.startswith("ok  127.0.0.1 port ")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("::ffff:10.0.0.1", False),
    ],
)  # fmt: skip
def test_what_is_loopback(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected

"""Signals reach a process that was known, and no other."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from osft_mcore.parallel.peers import Process, signal_process, this_process

TELLS = """
import dataclasses, json, time
from osft_mcore.parallel.peers import this_process
print(json.dumps(dataclasses.asdict(this_process())), flush=True)
time.sleep(60)
"""


@pytest.fixture
def other() -> Iterator[tuple["subprocess.Popen[str]", Process]]:
    """A process, and what it knows of itself."""
    child = subprocess.Popen([sys.executable, "-c", TELLS], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        yield child, Process(**json.loads(child.stdout.readline()))
    finally:
        child.kill()
        child.communicate()


def test_a_known_process_gets_the_signal(other: tuple["subprocess.Popen[str]", Process]) -> None:
    child, known = other
    assert (known.pid, known.machine) == (child.pid, this_process().machine)
    assert signal_process(known, signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    assert not signal_process(known, signal.SIGKILL), "it has ended"


@pytest.mark.parametrize("error", [OSError(errno.ENOSYS, "old"), PermissionError("forbidden")])
def test_a_kernel_without_handles_is_enough(
    other: tuple["subprocess.Popen[str]", Process],
    monkeypatch: pytest.MonkeyPatch,
    error: OSError,
) -> None:
    def refuse(_pid: int) -> int:
        raise error

    monkeypatch.setattr(os, "pidfd_open", refuse)
    child, known = other
    assert not signal_process(dataclasses.replace(known, started=1), signal.SIGKILL)
    assert child.poll() is None
    assert signal_process(known, signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    assert not signal_process(known, signal.SIGKILL), "it has ended"


@pytest.mark.parametrize("change", [{"machine": "elsewhere"}, {"machine": ""}, {"started": 1}])
def test_one_with_the_same_number_is_left_alone(
    other: tuple["subprocess.Popen[str]", Process], change: dict[str, object]
) -> None:
    child, known = other
    stranger = dataclasses.replace(known, **change)  # type: ignore[arg-type]
    assert not signal_process(stranger, signal.SIGKILL)
    assert child.poll() is None

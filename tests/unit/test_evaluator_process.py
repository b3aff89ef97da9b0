"""The evaluator's process as a run handles it, with small programs in its place."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from osft_mcore.config.schema import RunConfig
from osft_mcore.config.schema_evaluation import EvaluationConfig
from osft_mcore.parallel.world import PARENT
from osft_mcore.train.evaluator_process import EvaluatorProcess

ENDS_WITH_PARENT = "from osft_mcore.parallel.world import end_with_parent; end_with_parent(); "


def started(folder: Path, code: str, **evaluation: str) -> EvaluatorProcess:
    config = RunConfig(output_dir=str(folder), evaluation=EvaluationConfig(**evaluation))
    return EvaluatorProcess(config, (sys.executable, "-c", code))


def wait_until(happened: Callable[[], object]) -> None:
    """The test's own time limit is the deadline."""
    while not happened():
        time.sleep(0.01)


def test_its_log_begins_with_its_command_and_goes_on(tmp_path: Path) -> None:
    for _ in range(2):
        process = started(tmp_path, "print('hello')")
        wait_until(process.ended)
    lines = (tmp_path / "evaluator.log").read_text().splitlines()
    assert lines[1::2] == ["hello", "hello"]
    assert all(line.startswith("$ ") and line.endswith(str(tmp_path)) for line in lines[::2])


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; print('first'); sys.exit('no memory')", "exit code 1"),
        (
            "import os; print('no memory', flush=True); os.kill(os.getpid(), 9)",
            "ended by SIGKILL",
        ),
    ],
)
def test_how_it_ended_is_told_with_its_last_words(code: str, expected: str, tmp_path: Path) -> None:
    process = started(tmp_path, code)
    wait_until(process.ended)
    log = tmp_path / "evaluator.log"
    assert process.ended() == f"{expected}; its last words, 'no memory', and all others: {log}"


def test_one_that_does_not_listen_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("osft_mcore.train.evaluator_process.INTERRUPTED_S", 0.1)
    code = "import signal, time; signal.signal(2, signal.SIG_IGN); print('on'); time.sleep(600)"
    process = started(tmp_path, f"import sys; sys.stdout.reconfigure(line_buffering=True); {code}")
    wait_until(lambda: process.last_words() == "on")
    assert process.ended() == ""
    process.end()
    assert process.ended().startswith("ended by SIGKILL")
    process.end()


def test_requests_to_stop_a_job_are_for_the_run_to_answer(tmp_path: Path) -> None:
    """Slurm may send them to every process; the evaluator is needed until the run has stopped."""
    code = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    process = started(tmp_path, code)
    wait_until(process.ended)
    assert "SIGTERM" in process.last_words()
    assert "SIGUSR1" in process.last_words()


def test_cores_of_its_own_come_with_threads_for_them(tmp_path: Path) -> None:
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    for devices, expected in (("4-7", "4"), ("", os.environ["OMP_NUM_THREADS"])):
        process = started(tmp_path, code, devices=devices)
        wait_until(process.ended)
        assert process.last_words() == expected


def test_it_ends_with_whoever_started_it(tmp_path: Path) -> None:
    """Also if that ended before the kernel was asked to see to it."""
    command = [sys.executable, "-c", ENDS_WITH_PARENT + "print('lives')"]
    orphan = subprocess.run(
        command, env={**os.environ, PARENT: "1"}, capture_output=True, text=True, check=False
    )
    assert (orphan.returncode, orphan.stdout) == (137, "")
    process = started(tmp_path, ENDS_WITH_PARENT + "print('lives')")
    wait_until(process.ended)
    assert process.last_words() == "lives"

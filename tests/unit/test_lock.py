"""The lock of a run folder, held by real processes."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from osft_mcore.errors import ConfigError
from osft_mcore.log import lock
from osft_mcore.log.lock import lock_refusal, run_lock

HOLDER = """
import os, sys
from pathlib import Path
from osft_mcore.log.lock import run_lock

folder, job_id = sys.argv[1:]
with run_lock(Path(folder), job_id=job_id or None) as note:
    # A child that lives on has the same open file, and must not keep the lock.
    if os.fork() == 0:
        sys.stdin.read()
        os._exit(0)
    print(note, flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(folder: Path, job_id: str = "") -> Iterator["subprocess.Popen[str]"]:
    """A process that has the lock; it leaves when this ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), job_id],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None, "stdout was asked to be a pipe"
    assert process.stdout.readline() == "\n"
    yield process
    process.communicate()


def refusal_of(folder: Path, job_id: str | None = None, attempt: str = "") -> str:
    """What both ways of asking say."""
    asked = lock_refusal(folder, job_id=job_id, attempt=attempt)
    with (
        pytest.raises(ConfigError) as refused,
        run_lock(folder, job_id=job_id, attempt=attempt),
    ):
        pass
    assert refused.value.problems == (asked,)
    return asked


def note_of(folder: Path, job_id: str | None = None, attempt: str = "") -> str:
    assert lock_refusal(folder, job_id=job_id, attempt=attempt) == ""
    with run_lock(folder, job_id=job_id, attempt=attempt) as note:
        pass
    assert list(folder.iterdir()) == []
    return note


def write_lock(folder: Path, **changes: Any) -> None:
    """A lock that somebody left behind."""
    left = {"host": "elsewhere", "pid": 123, "job_id": "7", "started": "2026-01-31T08:00:00+00:00"}
    (folder / "run.lock").write_text(json.dumps(left | changes))


def test_the_file_says_whose_it_is_and_goes_with_the_run(tmp_path: Path) -> None:
    with held(tmp_path, "4711") as holder:
        content = json.loads((tmp_path / "run.lock").read_text())
    assert content.pop("started").endswith("+00:00")
    assert content == {
        "host": socket.gethostname(), "pid": holder.pid, "job_id": "4711", "attempt": ""
    }  # fmt: skip
    assert holder.returncode == 0
    assert list(tmp_path.iterdir()) == []
    assert note_of(tmp_path) == ""


@pytest.mark.parametrize("job_id", [None, "4711"])
def test_a_living_holder_is_named_and_keeps_the_lock(tmp_path: Path, job_id: str | None) -> None:
    with held(tmp_path, "4711") as holder:
        texts = {refusal_of(tmp_path, job_id) for _ in range(2)}
        (text,) = texts
    assert text.startswith(f"output_dir: {tmp_path} is in use by process {holder.pid} on ")
    assert f"{socket.gethostname()} (Slurm job 4711, started 20" in text
    assert text.endswith("wait for it, stop it, or choose another output_dir")


def test_the_lock_of_a_killed_holder_is_taken_over(tmp_path: Path) -> None:
    with held(tmp_path) as holder:
        holder.kill()
        holder.wait()
        assert (tmp_path / "run.lock").exists()
        note = note_of(tmp_path)
    assert note.startswith(f"took over the lock of process {holder.pid} on {socket.gethostname()}")
    assert note.endswith("which ended without removing it")


@pytest.mark.parametrize("job_id", [None, "8"])
def test_a_lock_from_another_machine_is_left_to_people(tmp_path: Path, job_id: str | None) -> None:
    write_lock(tmp_path)
    before = (tmp_path / "run.lock").read_text()
    text = refusal_of(tmp_path, job_id)
    assert "is locked by process 123 on elsewhere (Slurm job 7, started 2026-01-31T08" in text
    assert f"if it has ended delete {tmp_path / 'run.lock'}, or choose another" in text
    assert (tmp_path / "run.lock").read_text() == before


def test_a_job_without_an_id_is_no_requeued_job(tmp_path: Path) -> None:
    write_lock(tmp_path, job_id=None)
    assert "process 123 on elsewhere (started 2026" in refusal_of(tmp_path, None)


def test_a_taken_over_lock_names_its_new_holder_alone(tmp_path: Path) -> None:
    write_lock(tmp_path, host="elsewhere" * 20)
    with run_lock(tmp_path, job_id="7", attempt="1"):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_a_requeued_job_goes_on_with_its_lock(tmp_path: Path) -> None:
    for before, now in (("", "1"), ("1", "2")):
        write_lock(tmp_path, attempt=before)
        note = note_of(tmp_path, "7", now)
        assert note.startswith("took over the lock of process 123 on elsewhere (Slurm job 7, ")
        assert note.endswith(": the same job, started again")


@pytest.mark.parametrize("attempt", ["", "2"])
def test_another_step_of_the_same_job_is_another_run(tmp_path: Path, attempt: str) -> None:
    write_lock(tmp_path, attempt=attempt)
    assert "is locked by process 123 on elsewhere" in refusal_of(tmp_path, "7", attempt)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"host": "elsewhere"}'])
def test_a_lock_that_names_nobody_is_left_to_people(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "WRITE_S", 0.05)
    (tmp_path / "run.lock").write_text(content)
    text = refusal_of(tmp_path, "7")
    assert text == (
        f"output_dir: {tmp_path / 'run.lock'} does not say which job holds it; if none does, "
        "delete it"
    )


def test_a_lock_that_was_deleted_and_taken_by_another_stays(tmp_path: Path) -> None:
    with run_lock(tmp_path, job_id=None):
        (tmp_path / "run.lock").unlink()
        write_lock(tmp_path)
    assert json.loads((tmp_path / "run.lock").read_text())["host"] == "elsewhere"


def test_an_error_inside_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), run_lock(tmp_path, job_id=None):
        raise KeyError("x")
    assert note_of(tmp_path) == ""


def test_there_is_nothing_to_refuse_where_there_is_no_folder(tmp_path: Path) -> None:
    assert lock_refusal(tmp_path / "new" / "run", job_id=None) == ""


def test_without_locks_of_the_file_system_the_content_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No file system here is without locks, so this stands in for one.
    def no_locks(*_arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    monkeypatch.setattr(fcntl, "fcntl", no_locks)
    assert note_of(tmp_path) == ""
    here, gone = socket.gethostname(), subprocess.Popen(["true"])
    gone.wait()
    write_lock(tmp_path, host=here, pid=gone.pid)
    assert "cannot see whether that still runs" in refusal_of(tmp_path, None)
    # As a rank that torchrun started anew.
    assert "which ended without removing it" in note_of(tmp_path, "7")
    write_lock(tmp_path, host=here, pid=os.getppid())
    assert "cannot see whether that still runs" in refusal_of(tmp_path, "7")
    assert "which ended without removing it" in note_of(tmp_path, "7", "1")


RIVAL = """
import os, sys
from pathlib import Path
from osft_mcore.errors import ConfigError
from osft_mcore.log.lock import run_lock

folder, times = Path(sys.argv[1]), 0
while times < 150:
    try:
        with run_lock(folder, job_id=None) as note:
            assert note == "", note
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            os.unlink(folder / "inside")
            times += 1
    except ConfigError as error:
        assert "is in use by" in str(error), error
"""


def test_rivals_are_never_inside_together(tmp_path: Path) -> None:
    """Taking, giving back and taking again, as fast as they can."""
    command = [sys.executable, "-c", RIVAL, str(tmp_path)]
    rivals = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    errors = [rival.communicate()[1] for rival in rivals]
    assert errors == [""] * 4
    assert os.listdir(tmp_path) == []

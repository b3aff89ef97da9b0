"""What the process that trains leaves for the evaluator, file by file."""

from dataclasses import replace
from pathlib import Path

import pytest

from osft_mcore.config.schema import RunConfig
from osft_mcore.config.schema_evaluation import EvaluationConfig
from osft_mcore.train.snapshots import (
    READY,
    Entry,
    announce_end,
    clear,
    end_announced,
    entry_folder,
    fail_damaged,
    failure,
    is_waiting,
    publish,
    snapshots_folder,
    waiting,
    withdraw,
)


def entry(step: int, temperature: float = 1.0, number: int = 1) -> Entry:
    return Entry(step=step, temperature=temperature, number=number, weights=f"/weights/{step}")


def test_they_come_by_step_and_in_the_order_of_asking(tmp_path: Path) -> None:
    asked = [entry(12), entry(0, 1.0, 1), entry(4), entry(0, 0.6, 3), entry(0, 0.0, 2)]
    for one in asked:
        publish(tmp_path, one)
    order = [(0, 1.0), (0, 0.0), (0, 0.6), (4, 1.0), (12, 1.0)]
    assert [one.at for one in waiting(tmp_path)] == order
    assert set(waiting(tmp_path)) == set(asked)


def test_what_is_not_complete_does_not_count(tmp_path: Path) -> None:
    folder = entry_folder(tmp_path, (4, 1.0))
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    (folder / f"{READY}.tmp").write_text("{")
    assert waiting(tmp_path) == []
    assert not is_waiting(tmp_path, (4, 1.0))
    publish(tmp_path, entry(4))
    assert is_waiting(tmp_path, (4, 1.0))
    assert not is_waiting(tmp_path, (4, 0.5))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "Expecting value"),
        (b'{"step": 4, "temp', "Unterminated string"),
        (b"\xff\xfe\xff", "decode"),
        (b"[]", "mapping"),
        (b'{"step": 4}', "missing 3 required"),
        (b'{"step": "4", "temperature": 1, "number": 1, "weights": ""}', "step='4'"),
        (b'{"step": 5, "temperature": 1, "number": 1, "weights": ""}', "step_5_temperature_1"),
    ],
)
def test_a_damaged_entry_is_told_and_holds_up_no_other(
    content: bytes, expected: str, tmp_path: Path
) -> None:
    for step in (4, 8):
        publish(tmp_path, entry(step))
    marker = entry_folder(tmp_path, (4, 1.0)) / READY
    marker.write_bytes(content)
    assert [one.step for one in waiting(tmp_path)] == [8]
    [line] = fail_damaged(tmp_path)
    assert line.startswith(f"{marker} cannot be read: ")
    assert expected in line
    assert (failure(tmp_path, (4, 1.0)), failure(tmp_path, (8, 1.0))) == (line, "")
    assert not marker.parent.exists()
    assert fail_damaged(tmp_path) == []
    assert [one.step for one in clear(tmp_path)] == [8]
    assert not tmp_path.exists()


def test_a_removal_that_breaks_off_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, entry(4))
    monkeypatch.setattr("osft_mcore.train.snapshots.shutil.rmtree", lambda *_, **__: None)
    withdraw(tmp_path, (4, 1.0))
    assert entry_folder(tmp_path, (4, 1.0)).is_dir()
    assert waiting(tmp_path) == []


def test_a_removal_takes_the_weights_along(tmp_path: Path) -> None:
    publish(tmp_path, entry(4))
    (entry_folder(tmp_path, (4, 1.0)) / "model.safetensors").write_text("weights")
    withdraw(tmp_path, (4, 1.0))
    withdraw(tmp_path, (8, 1.0))
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_start_leaves_only_what_is_wanted(tmp_path: Path) -> None:
    queue = tmp_path / "snapshots"
    for step in (2, 4, 6):
        publish(queue, entry(step))
    half = entry_folder(queue, (8, 1.0))
    half.with_name(half.name + ".tmp").mkdir()
    half.mkdir()
    announce_end(queue)
    assert end_announced(queue)
    lost = clear(queue, keep=[(4, 1.0), (8, 1.0)])
    assert [one.step for one in lost] == [2, 6]
    assert [path.name for path in queue.iterdir()] == ["step_4_temperature_1"]
    assert not end_announced(queue)
    assert [one.step for one in clear(queue)] == [4]
    assert not queue.exists()
    assert clear(queue) == []


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    announce_end(tmp_path)
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_runs_that_share_a_folder_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shared = RunConfig(evaluation=EvaluationConfig(snapshots="/dev/shm"))
    a, b = (snapshots_folder(replace(shared, output_dir=name)) for name in ("a/run", "b/run"))
    assert a != b
    assert a.parent == b.parent == Path("/dev/shm")
    # However the command names the run.
    assert a == snapshots_folder(replace(shared, output_dir=str(tmp_path / "a" / "run")))
    own = snapshots_folder(RunConfig(output_dir="a/run"))
    assert own == tmp_path / "a" / "run" / "snapshots"

"""Killed at any moment of a save, out of room, damaged: a whole checkpoint is left, and found."""

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from osft_mcore.checkpoint import save as save_module
from osft_mcore.checkpoint.background import BackgroundJob
from osft_mcore.checkpoint.folder import LATEST, checkpoints_in, newest_whole, prepare, sweep
from osft_mcore.checkpoint.manifest import MANIFEST, problems_of
from osft_mcore.checkpoint.save import RECEIPTS, Part, Rest, part_name, write_part, write_rest
from osft_mcore.errors import CheckpointError
from osft_mcore.weights.safetensors_stream import TensorSpec

RANKS = (0, 1)
NUM_TENSORS = 3
ELEMENTS = 1000
SOON = 60.0


def tensor(step: int, rank: int, number: int) -> torch.Tensor:
    return torch.full((ELEMENTS,), float(100 * step + 10 * rank + number))


def part(step: int, rank: int, elements: int = ELEMENTS) -> Part:
    specs = [
        TensorSpec(f"{rank}/{number}", torch.float32, (elements,)) for number in range(NUM_TENSORS)
    ]
    values = [tensor(step, rank, number)[:1].repeat(elements) for number in range(NUM_TENSORS)]
    return Part(file=part_name(rank), specs=specs, tensors=lambda: values)


def rest(root: Path, step: int) -> Rest:
    return Rest(
        root=root,
        step=step,
        parts=[part_name(rank) for rank in RANKS],
        contents={"state.json": json.dumps({"step": step}).encode(), "model/config.json": b"{}"},
        details={"step": step},
        keep_last=2,
        keep_every=0,
    )


def save(root: Path, step: int) -> None:
    building = prepare(root, step)
    for rank in RANKS:
        write_part(building, part(step, rank))
    write_rest(building, rest(root, step), deadline=time.monotonic() + SOON)


def newest(root: Path) -> int:
    """Step of the newest whole checkpoint, every value of which is looked at."""
    found = newest_whole(checkpoints_in(root), lambda path: problems_of(path, hashes=True))
    assert found.folder is not None, found.skipped
    step = int(json.loads((found.folder / "state.json").read_text())["step"])
    assert found.folder.name == f"step_{step}"
    for rank in RANKS:
        values = load_file(found.folder / part_name(rank))
        for number in range(NUM_TENSORS):
            assert torch.equal(values[f"{rank}/{number}"], tensor(step, rank, number))
    return step


def forked(body: Callable[[], None]) -> int:
    """Exit status of `body` in a child; negative: the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(point: int, root: Path) -> None:
    """SIGKILL before the `point`-th thing that happens to a file under `root`.

    Python announces every open, rename, unlink, mkdir and rmdir; what lies before one lies after
    the one before it. Values and flushes count as well.
    """
    counter = itertools.count(1)

    def happens() -> None:
        if next(counter) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            path = os.fspath(args[0]) if isinstance(args[0], str | os.PathLike) else ""
            if path.startswith(str(root)):
                happens()

    sys.addaudithook(hook)
    real_fsync, real_values = os.fsync, save_module.write_safetensors

    def fsync(descriptor: int) -> None:
        happens()
        real_fsync(descriptor)

    def values(path: Path, specs: Any, tensors: Any) -> Any:
        def counted() -> Iterator[torch.Tensor]:
            for value in tensors:
                happens()
                yield value

        return real_values(path, specs, counted())

    os.fsync, save_module.write_safetensors = fsync, values


def test_killed_at_any_point_of_a_save_nothing_is_lost(tmp_path: Path) -> None:
    outcomes = []
    for point in itertools.count(1):
        root = tmp_path / f"point_{point}"
        # With the third, the first is deleted: also in the middle of that.
        save(root, 1)
        save(root, 2)

        def body(root: Path = root, point: int = point) -> None:
            kill_at(point, root)
            save(root, 3)

        status = forked(body)
        found = newest(root)
        outcomes.append(found)
        named = root / (root / LATEST).read_text().strip()
        assert problems_of(named, hashes=True) == [], "`latest` names what is not whole"
        # The program starts again: what was left in the middle is swept away, and saving works.
        sweep(root)
        assert {path.name for path in root.iterdir()} <= {"step_1", "step_2", "step_3", LATEST}
        save(root, 4)
        assert newest(root) == 4
        assert (root / LATEST).read_text() == "step_4\n"
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert sorted(outcomes) == outcomes
    assert set(outcomes) == {2, 3}
    assert outcomes.count(2) > 30
    assert outcomes.count(3) > 5, "points after the rename"


def damage_truncate(path: Path) -> str:
    os.truncate(path, path.stat().st_size - 1)
    return "bytes, the manifest says"


def damage_bit(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return "SHA-256"


def damage_delete(path: Path) -> str:
    path.unlink()
    return "is missing"


@pytest.mark.parametrize("damage", [damage_truncate, damage_bit, damage_delete])
@pytest.mark.parametrize("file", ["rank_00001.safetensors", "state.json", "model/config.json"])
def test_a_damaged_checkpoint_is_skipped_and_named(
    tmp_path: Path, damage: Callable[[Path], str], file: str
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    expected = damage(tmp_path / "step_2" / file)
    found = newest_whole(checkpoints_in(tmp_path), lambda path: problems_of(path, hashes=True))
    assert found.folder == tmp_path / "step_1"
    [reason] = found.skipped
    assert str(tmp_path / "step_2" / file) in reason
    assert expected in reason


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b'{"files": {"../x": {"size": 1}}}'])
def test_a_checkpoint_without_a_manifest_is_none(tmp_path: Path, content: bytes | None) -> None:
    save(tmp_path, 1)
    manifest = tmp_path / "step_1" / MANIFEST
    manifest.unlink()
    if content is not None:
        manifest.write_bytes(content)
    [problem] = problems_of(tmp_path / "step_1", hashes=False)
    assert "manifest.json" in problem


def test_files_outside_of_the_checkpoint_are_not_looked_at(tmp_path: Path) -> None:
    save(tmp_path, 1)
    manifest = tmp_path / "step_1" / MANIFEST
    content = json.loads(manifest.read_text())
    content["files"]["../../secret"] = content["files"].pop("state.json")
    manifest.write_text(json.dumps(content))
    [problem] = problems_of(tmp_path / "step_1", hashes=True)
    assert "outside of the checkpoint" in problem


def test_old_checkpoints_go_and_multiples_stay(tmp_path: Path) -> None:
    for step in range(1, 8):
        building = prepare(tmp_path, step)
        for rank in RANKS:
            write_part(building, part(step, rank))
        kept = {**{"keep_last": 2, "keep_every": 3}}
        full = rest(tmp_path, step)
        write_rest(
            building,
            Rest(**{name: getattr(full, name) for name in full.__slots__} | kept),
            deadline=time.monotonic() + SOON,
        )
    assert [path.name for path in checkpoints_in(tmp_path)] == [
        "step_7", "step_6", "step_3"
    ]  # fmt: skip


def test_a_rank_that_fails_is_known_to_the_one_that_waits(tmp_path: Path) -> None:
    building = prepare(tmp_path, 1)
    write_part(building, part(1, 0))
    broken = part(1, 1)
    with pytest.raises(CheckpointError, match="announced as"):
        write_part(
            building,
            Part(file=broken.file, specs=broken.specs, tensors=lambda: [torch.zeros(1)] * 3),
        )
    assert not (building / part_name(1)).exists()
    with pytest.raises(CheckpointError, match=r"rank_00001.*announced as"):
        write_rest(building, rest(tmp_path, 1), deadline=time.monotonic() + SOON)
    assert checkpoints_in(tmp_path) == []


def test_a_rank_that_never_comes_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    building = prepare(tmp_path, 1)
    write_part(building, part(1, 0))
    with pytest.raises(CheckpointError, match=r"rank_00001\.safetensors not written within"):
        write_rest(building, rest(tmp_path, 1), deadline=time.monotonic() + 0.2)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"size": NaN}', b'{"size": 1}', b"[" * 100_000])
def test_a_receipt_that_says_nothing_fails_the_save(tmp_path: Path, content: bytes) -> None:
    building = prepare(tmp_path, 1)
    for rank in RANKS:
        write_part(building, part(1, rank))
    receipt = building / RECEIPTS / f"{part_name(1)}.json"
    receipt.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{receipt} is damaged: "):
        write_rest(building, rest(tmp_path, 1), deadline=time.monotonic() + SOON)
    assert checkpoints_in(tmp_path) == []


def test_a_writer_that_fails_or_hangs_is_told_once() -> None:
    job = BackgroundJob(background=True)

    def fails() -> None:
        raise MemoryError("no room")

    job.start(fails)
    assert "no room" in job.wait(time.monotonic() + SOON)
    assert job.wait(time.monotonic() + SOON) == ""
    going = [True]

    def hangs() -> None:
        while going:
            time.sleep(0.01)

    job.start(hangs)
    assert "still being written" in job.wait(time.monotonic() + 0.1)
    assert job.running
    going.clear()
    assert job.wait(time.monotonic() + SOON) == ""


def test_a_full_disk_is_named_and_the_one_before_stays(small_disk: Path) -> None:
    root = small_disk / "checkpoints"
    save(root, 1)
    building = prepare(root, 2)
    with pytest.raises(CheckpointError, match=r"No space left on device \(4\.6 MiB needed here"):
        write_part(building, part(2, 0, elements=400_000))
    assert not (building / part_name(0)).exists(), "it would keep the room that others need"
    with pytest.raises(CheckpointError, match="No space left"):
        write_rest(building, rest(root, 2), deadline=time.monotonic() + SOON)
    assert newest(root) == 1
    sweep(root)
    save(root, 2)
    assert newest(root) == 2

"""A save that fails is told on all ranks, counted, and leaves what was saved before."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_random_model
from ranks import run_ranks

from osft_mcore.actor.actor import Actor
from osft_mcore.checkpoint.folder import checkpoints_in
from osft_mcore.checkpoint.manifest import problems_of
from osft_mcore.config.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
)
from osft_mcore.errors import CheckpointError, Stopped
from osft_mcore.log.console import Console
from osft_mcore.log.metrics import Clock
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.stop import STOP_FILE
from osft_mcore.parallel.topology import Topology
from osft_mcore.train import checkpoints as module
from osft_mcore.train.checkpoints import Checkpoints
from osft_mcore.train.edge import StepEdge
from osft_mcore.train.start import build_actor

TP2 = Topology(tp=2, pp=1, dp=1)
MIB = 2**20
SLOW_S = 3.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"))


def make_actor(model: Path) -> Actor:
    config = RunConfig(
        model=ModelConfig(path=str(model), dtype="fp32"), parallel=ParallelConfig(tp=2)
    )
    return build_actor(config, join_groups(TP2, device=torch.device("cpu")))


def make(rank: int, actor: Actor, root: Path, **options: Any) -> Checkpoints:
    console = Console(enabled=rank == 0, progress=False)
    return Checkpoints(root, CheckpointConfig(**options), actor, {}, console)


def failing_rank(rank: int, model: Path, root: Path, background: bool) -> list[str]:
    """Saves of which rank 1's part fails at 2, 3 and 5; what was raised, by step."""
    checkpoints = make(rank, make_actor(model), root, async_=background, max_failures=2)
    real = module.write_part

    def write_part(building: Path, part: Any) -> None:
        if rank == 1 and building.name in ("step_2.tmp", "step_3.tmp", "step_5.tmp"):
            # As when the memory runs out in the thread that writes.
            part = replace(part, tensors=lambda: iter([1 / 0]))
        real(building, part)

    module.write_part = write_part
    raised = []
    for step in (1, 5, 4, 2, 3):
        try:
            checkpoints.save(step, {})
            checkpoints.settle()
            raised.append("")
        except CheckpointError as error:
            raised.append(str(error))
    return raised


@pytest.mark.parametrize("background", [True, False])
def test_a_writer_that_fails_is_told_everywhere_and_counted(
    model: Path, tmp_path: Path, background: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = run_ranks(failing_rank, 2, model=model, root=tmp_path, background=background)
    assert first == second
    # One failure alone goes on, a success begins the count anew, the second in a row stops.
    assert [bool(message) for message in first] == [False, False, False, False, True]
    assert "step_3 was not saved: " in first[-1]
    assert "rank_00001.safetensors: ZeroDivisionError" in first[-1]
    assert "failed saves in a row: 2 (checkpoint.max_failures = 2)" in first[-1]
    said = capfd.readouterr().out
    assert "WARNING: checkpoint step_5 was not saved" in said
    assert "WARNING: checkpoint step_2 was not saved" in said
    kept = checkpoints_in(tmp_path)
    assert [path.name for path in kept] == ["step_4", "step_1"]
    assert [problems_of(path, hashes=True) for path in kept] == [[], []]
    assert not list(tmp_path.glob("*.tmp"))


def failing_copy(rank: int, model: Path, root: Path) -> str:
    """Rank 1 cannot copy its state to the host; what was raised."""
    actor = make_actor(model)
    checkpoints = make(rank, actor, root)
    if rank == 1:
        checkpoints._host = {0: torch.zeros(1)}  # Of another shape: the copy fails.
        actor.call_before_step = lambda take: take()  # type: ignore[method-assign]
    try:
        checkpoints.save_now(1, {})
    except CheckpointError as error:
        return str(error)
    return "nothing"


def test_a_copy_that_fails_is_told_at_once(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And not when checkpoint.timeout_minutes have passed: the test would not wait so long."""
    first, second = run_ranks(failing_copy, 2, model=model, root=tmp_path, timeout_s=60.0)
    assert first == second == "step 1 could not be saved; see above"
    assert "rank_00001.safetensors: cannot copy the training state: " in capfd.readouterr().out
    assert checkpoints_in(tmp_path) == []


def vanishing_disk(rank: int, model: Path, folder: Path) -> list[str]:
    """Begin where the system refuses to look; then save where it came to that."""
    actor, refused = make_actor(model), folder / ("x" * 300) / "checkpoints"
    checkpoints = make(rank, actor, folder)
    checkpoints.save_now(1, {})
    checkpoints._root = refused
    told = []
    for attempt in (lambda: make(rank, actor, refused), lambda: checkpoints.save_now(2, {})):
        try:
            attempt()
        except CheckpointError as error:
            told.append(str(error))
    return told


def test_a_disk_that_only_rank_0_looks_at_is_told_to_all(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """If rank 0 raised alone, the other would wait for it."""
    first, second = run_ranks(vanishing_disk, 2, model=model, folder=tmp_path, timeout_s=60.0)
    assert first == second
    assert "File name too long" in first[0]
    assert first[1] == "step 2 could not be saved; see above"
    said = capfd.readouterr().out
    assert "step_2 was not saved" in said
    assert "is the disk of output_dir still there?" in said


def filling_disk(rank: int, model: Path, disk: Path) -> list[str]:
    """Save, fill the disk, fail twice, make room, save; then begin where there is no room."""
    actor = make_actor(model)
    checkpoints = make(rank, actor, disk / "checkpoints", async_=False)
    checkpoints.save(1, {})
    ballast = disk / f"ballast_{rank}"
    if rank == 0:
        left = os.statvfs(disk)
        ballast.write_bytes(bytes(left.f_bavail * left.f_frsize - MIB // 8))
    torch.distributed.barrier()
    checkpoints.save(2, {})
    try:
        checkpoints.save_now(3, {})
    except CheckpointError as error:
        told = [str(error)]
    try:
        make(rank, actor, disk / "other")
    except CheckpointError as error:
        told.append(str(error))
    torch.distributed.barrier()
    if rank == 0:
        ballast.unlink()
    torch.distributed.barrier()
    checkpoints.save_now(4, {})
    return told


def test_a_full_disk_is_told_before_anything_is_written(
    model: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = run_ranks(filling_disk, 2, model=model, disk=small_disk)
    assert first == second
    assert "step 3 could not be saved" in first[0]
    assert "other: a checkpoint takes" in first[1]
    assert "make room" in first[1]
    assert "choose another output_dir" in first[1]
    assert "step_2 was not saved: " in capfd.readouterr().out
    kept = checkpoints_in(small_disk / "checkpoints")
    assert [path.name for path in kept] == ["step_4", "step_1"]
    assert all(problems_of(path, hashes=True) == [] for path in kept)


def stopped_while_saving(rank: int, model: Path, out: Path) -> list[float]:
    """Told to stop while a slow save goes on: seconds of each stay in `save`."""
    actor, stays = make_actor(model), list[float]()
    config = RunConfig(
        output_dir=str(out),
        model=ModelConfig(path=str(model)),
        # Any file: the edge keeps its digest.
        data=DataConfig(train=str(model / "config.json")),
        checkpoint=CheckpointConfig(every=1),
    )
    real = module.write_part

    def write_part(building: Path, part: Any) -> None:
        time.sleep(SLOW_S * (building.name == "step_1.tmp"))
        real(building, part)

    @contextmanager
    def within(phase: str) -> Iterator[None]:
        assert phase == "save"
        began = time.monotonic()
        yield
        stays.append(time.monotonic() - began)

    module.write_part = write_part
    checkpoints = make(rank, actor, out / "checkpoints")
    edge = StepEdge(
        config, "train", 9, actor=actor, checkpoints=checkpoints, clock=Clock(within=within)
    )
    with edge.listening():
        edge.passed(1, sound=True)
        stays.clear()
        (out / STOP_FILE).touch()
        with pytest.raises(Stopped, match="stopped after step 2 of 9 and saved it"):
            edge.passed(2, sound=True)
    return stays


def test_a_run_that_stops_has_a_whole_limit_for_its_last_save(model: Path, tmp_path: Path) -> None:
    """The save before it, in the background, has had its own time."""
    for before, last in run_ranks(stopped_while_saving, 2, model=model, out=tmp_path):
        assert before > SLOW_S / 2 > last
    assert [folder.name for folder in checkpoints_in(tmp_path / "checkpoints")] == [
        "step_2",
        "step_1",
    ]

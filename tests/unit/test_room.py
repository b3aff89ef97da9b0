"""What a full disk is answered with: what is missing, and what the run keeps without need."""

from pathlib import Path

import pytest

from osft_mcore.checkpoint.folder import set_aside
from osft_mcore.log.run_folder import RunFolder
from osft_mcore.train.room import NUM_SHOWN, lacking_room

MIB = 2**20
TOO_MUCH = 2**62


def checkpoint(run: Path, name: str, size: int) -> Path:
    folder = run / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "rank_00000.safetensors").write_bytes(bytes(size))
    return folder


def unfinished(run: Path, size: int) -> Path:
    folder = RunFolder(run, writer=True)
    folder.create()
    folder.write_json("manifest.json", {})
    (run / "hf").mkdir()
    (run / "hf" / "model.safetensors").write_bytes(bytes(size))
    aside = folder.put_aside()
    assert aside is not None
    return aside


def test_what_the_run_does_not_need_is_named_largest_first(tmp_path: Path) -> None:
    run = tmp_path / "run"
    root = run / "checkpoints"
    assert lacking_room(root, 1) == ""
    assert "the run does not need" not in lacking_room(root, TOO_MUCH)
    kept = checkpoint(run, "step_4", 7 * MIB)
    small = set_aside(checkpoint(run, "step_5", MIB))
    named = set_aside(checkpoint(run, "step_6", 4 * MIB))
    large = unfinished(run, 3 * MIB)
    for somebodys in ("step_7.unused.mine", "step_7.tmp", "mine"):
        checkpoint(run, somebodys, 5 * MIB)
    assert lacking_room(root, 1) == ""
    answer = lacking_room(root, TOO_MUCH, protected=named.resolve())
    assert answer.startswith(f"{root}: a checkpoint takes 4294967296.0 GiB, but ")
    assert answer.endswith(
        f"choose another output_dir; the run does not need {large} (3.0 MiB), {small} (1.0 MiB)"
    )
    assert f"{kept} " not in answer
    inside = (large / "hf").resolve()
    assert str(large) not in lacking_room(root, TOO_MUCH, protected=inside), "it holds what is used"
    (run / "unfinished_9").symlink_to(tmp_path)
    assert "unfinished_9" not in lacking_room(root, TOO_MUCH), "a link frees nothing"


def test_many_folders_are_counted(tmp_path: Path) -> None:
    for _ in range(NUM_SHOWN + 2):
        set_aside(checkpoint(tmp_path, "step_1", 1))
    answer = lacking_room(tmp_path / "checkpoints", TOO_MUCH)
    assert answer.count(" bytes)") == NUM_SHOWN
    assert answer.endswith(" and 2 more such folders")


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/checkpoints"])
def test_a_path_that_the_system_refuses_is_an_answer(tmp_path: Path, name: str) -> None:
    answer = lacking_room(tmp_path / name, 1)
    assert "File name too long; is the disk of output_dir still there?" in answer

"""A conversion that is killed leaves nothing that looks complete, and is gone on with."""

import fcntl
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import save_random_model

from osft_mcore import files
from osft_mcore.checkpoint import assemble
from osft_mcore.checkpoint.convert import hf_to_mcore, mcore_to_hf
from osft_mcore.checkpoint.manifest import problems_of
from osft_mcore.checkpoint.staging import Staging, staging
from osft_mcore.errors import CheckpointError, ConfigError
from osft_mcore.files import FileRecord, write_file
from osft_mcore.log.console import Console
from osft_mcore.parallel.topology import Topology

QUIET = Console(enabled=False)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "hf", "qwen2", tied=True)


def to_mcore(hf: Path, out: Path, **changes: Any) -> None:
    options: dict[str, Any] = {
        "topology": Topology(tp=2, pp=1, dp=1),
        "vocab_multiple": 64,
        "dtype": None,
        "target": "safetensors",
        "console": QUIET,
    }
    hf_to_mcore(hf, out, **options | changes)


def to_torch_dist(hf: Path, out: Path) -> None:
    to_mcore(hf, out, target="torch_dist")


def to_hf(mcore: Path, out: Path) -> None:
    mcore_to_hf(
        mcore,
        out,
        hf_config=None,
        dtype=None,
        max_shard_bytes=100_000,
        hashes=True,
        console=QUIET,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the manifest, which has the time of writing."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def killed(work: Callable[[], None], arm: Callable[[], None]) -> bool:
    """Call `work` in a forked process that `arm` has rigged; True if it was killed on the way."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            arm()
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert status == 0, "neither done nor killed"
    return False


def kill_at_rename(number: int) -> None:
    """Die before rename `number` (from 0): a receipt, the manifest, the folder."""
    replace, left = os.replace, [number]

    def rigged(old: Path, new: Path) -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        replace(old, new)

    files.os.replace = rigged  # type: ignore[attr-defined]


def kill_at_tensor(number: int) -> None:
    """Die within a file, when tensor `number` is asked for."""
    filled, left = assemble.filled, [number]

    def rigged(*arguments: Any, **options: Any) -> Any:
        for each in filled(*arguments, **options):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            yield each

    assemble.filled = rigged  # type: ignore[attr-defined]


@pytest.mark.parametrize("work", [to_mcore, to_hf, to_torch_dist])
def test_killed_at_any_rename_it_goes_on(
    hf: Path, tmp_path: Path, work: Callable[[Path, Path], None]
) -> None:
    source = hf
    if work is to_hf:
        source = tmp_path / "source"
        to_mcore(hf, source)
    work(source, tmp_path / "undisturbed")
    expected = contents(tmp_path / "undisturbed")
    for number in range(100):
        out = tmp_path / str(number)
        if not killed(lambda out=out: work(source, out), lambda n=number: kill_at_rename(n)):
            break
        assert not out.exists()
        work(source, out)
        assert contents(out) == expected
        assert problems_of(out, hashes=True) == []
        assert not out.with_name(f"{number}.tmp").exists()
    parts = [name for name in expected if name.endswith((".safetensors", ".distcp"))]
    # Receipts at the start, with each file of tensors and with all others; manifest, folder.
    assert number >= len(parts) + 4


@pytest.mark.parametrize("number", [0, 7, 30])
def test_killed_within_a_file_it_goes_on_after_the_complete_ones(
    hf: Path, tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out, building = tmp_path / "out", tmp_path / "out.tmp"
    to_mcore(hf, tmp_path / "undisturbed")
    assert killed(lambda: to_mcore(hf, out), lambda: kill_at_tensor(number))
    assert not out.exists()
    assert not (building / "manifest.json").exists()
    parts = sorted(path.name for path in building.glob("*.safetensors"))
    before = {name: (building / name).stat().st_mtime_ns for name in parts}
    to_mcore(hf, out, console=Console(enabled=True))
    after = {name: (out / name).stat().st_mtime_ns for name in parts}
    assert contents(out) == contents(tmp_path / "undisturbed")
    kept = [name for name in parts if before[name] == after[name]]
    assert kept == parts[:-1], "all but the one that it died in"
    assert (f"going on with {len(kept)} complete files" in capsys.readouterr().out) == bool(kept)


def test_a_file_that_was_damaged_meanwhile_is_written_again(hf: Path, tmp_path: Path) -> None:
    out, building = tmp_path / "out", tmp_path / "out.tmp"
    to_mcore(hf, tmp_path / "undisturbed")
    assert killed(lambda: to_mcore(hf, out), lambda: kill_at_tensor(30))
    first = building / "rank_00000.safetensors"
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    (building / "stranger").write_text("not ours")
    to_mcore(hf, out)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_another_conversion_does_not_go_on(hf: Path, tmp_path: Path) -> None:
    out, building = tmp_path / "out", tmp_path / "out.tmp"
    assert killed(lambda: to_mcore(hf, out), lambda: kill_at_tensor(30))
    before = contents(building)
    with pytest.raises(ConfigError, match=r"differs in pp\)"):
        to_mcore(hf, out, topology=Topology(tp=2, pp=2, dp=1))
    changed = save_random_model(tmp_path / "hf", "qwen2", tied=True, seed=1)
    with pytest.raises(ConfigError, match=r"differs in source\)"):
        to_mcore(changed, out)
    assert contents(building) == before
    to_mcore(hf, out)


def test_a_folder_of_someone_else_is_left_alone(hf: Path, tmp_path: Path) -> None:
    building = tmp_path / "out.tmp"
    building.mkdir()
    (building / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="was not begun by this program"):
        to_mcore(hf, tmp_path / "out")
    assert contents(building) == {"thesis.txt": b"precious"}


def test_two_at_once_is_refused(hf: Path, tmp_path: Path) -> None:
    building = tmp_path / "out.tmp"
    building.mkdir()
    descriptor = os.open(building, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="another process is writing there"):
        to_mcore(hf, tmp_path / "out")
    os.close(descriptor)
    to_mcore(hf, tmp_path / "out")


def test_a_write_that_fails_keeps_what_is_complete(tmp_path: Path) -> None:
    job = {"conversion": "test"}

    def full(path: Path) -> FileRecord:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def open_and_write(second: Callable[[Path], FileRecord]) -> Staging:
        with staging(tmp_path / "out", job) as opened:
            opened.write("a", lambda path: write_file(path, [b"first"]))
            opened.write("b/c", second)
            opened.publish({"more": 1})
        return opened

    with pytest.raises(CheckpointError, match=r"out\.tmp/b/c: No space left .* repeat the command"):
        open_and_write(full)
    again = open_and_write(lambda path: write_file(path, [b"second"]))
    assert again.found == ("a",)
    assert contents(tmp_path / "out") == {"a": b"first", "b/c": b"second"}
    assert problems_of(tmp_path / "out", hashes=True) == []


def test_there_must_be_room(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = assemble.shutil.disk_usage(tmp_path)  # type: ignore[attr-defined]
    monkeypatch.setattr(
        "shutil.disk_usage", lambda _path: type(usage)(usage.total, usage.total - 10, 10)
    )
    for target in ("safetensors", "torch_dist"):
        with pytest.raises(
            CheckpointError, match=r"are still to be written, but 10 bytes are free"
        ):
            to_mcore(hf, tmp_path / target, target=target)
        left = [path.name for path in (tmp_path / f"{target}.tmp").iterdir()]
        assert left == ["manifest.partial.json"]


def test_a_link_is_no_place_to_build(hf: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("out.tmp", "out"):
        (tmp_path / name).symlink_to(elsewhere)
        with pytest.raises(ConfigError, match=rf"{name}'.* is not a folder"):
            to_mcore(hf, tmp_path / "out")
        (tmp_path / name).unlink()
    assert list(elsewhere.iterdir()) == []
    to_mcore(hf, tmp_path / "out")


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_a_folder_without_a_name_cannot_be_written(hf: Path, out: str) -> None:
    with pytest.raises(ConfigError, match="has no name of its own"):
        to_mcore(hf, Path(out))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[" * 200_000,
        '{"job": {}, "files": {"a": {}}}',
        '{"job": {}, "files": {"a": {"size": Infinity, "sha256": ""}}}',
        '{"job": {}, "files": {"../a": {"size": 1, "sha256": ""}}}',
        '{"job": {}, "files": []}',
        '{"job": 3, "files": {}}',
        "[]",
    ],
)
def test_damaged_receipts_are_refused(hf: Path, tmp_path: Path, content: str) -> None:
    building = tmp_path / "out.tmp"
    building.mkdir()
    (building / "manifest.partial.json").write_text(content)
    with pytest.raises(ConfigError, match="was not begun by this program; remove it"):
        to_mcore(hf, tmp_path / "out")

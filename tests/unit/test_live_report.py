"""The report beside a run: refreshed, left behind at the end, and no harm if it fails."""

import os
import sys
import time
from pathlib import Path

import pytest
from run_folders import write_run

from osft_mcore.config.schema import ReportConfig
from osft_mcore.errors import Stopped
from osft_mcore.log.console import Console
from osft_mcore.log.run_folder import RunFolder
from osft_mcore.parallel.world import PARENT
from osft_mcore.train import live_report as module
from osft_mcore.train.live_report import live_report

AT_END = ReportConfig(every_minutes=0)
OFTEN = ReportConfig(every_minutes=0.05 / 60, at_end=False)


def program(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


def folder_in(path: Path, *, writer: bool = True) -> RunFolder:
    return RunFolder(write_run(path / "run"), writer=writer)


def wait_for(file: Path) -> str:
    deadline = time.monotonic() + 30
    while not (file.is_file() and file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return file.read_text()


def test_the_end_leaves_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_in(tmp_path)
    with live_report(folder, AT_END, Console(enabled=True)):
        assert not (folder.path / "report.html").exists()
    assert "<!doctype html>" in (folder.path / "report.html").read_text()
    assert capsys.readouterr().out == f"report: {folder.path / 'report.html'}\n"


def test_a_rank_that_a_launcher_started_leaves_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PARENT, str(os.getppid()))
    folder = folder_in(tmp_path)
    with live_report(folder, AT_END, Console(enabled=False)):
        pass
    assert (folder.path / "report.html").is_file()


def test_a_run_that_is_told_to_stop_leaves_one_too(tmp_path: Path) -> None:
    folder = folder_in(tmp_path)
    code = f"open({str(tmp_path / 'made')!r}, 'w').write('x')"
    with pytest.raises(Stopped), live_report(folder, AT_END, Console(enabled=False), program(code)):
        raise Stopped("told to")
    assert (tmp_path / "made").is_file()


@pytest.mark.parametrize("cfg", [ReportConfig(), ReportConfig(at_end=False, every_minutes=0)])
def test_an_error_is_not_delayed_by_a_report(cfg: ReportConfig, tmp_path: Path) -> None:
    folder = folder_in(tmp_path)
    code = f"open({str(tmp_path / 'made')!r}, 'w').write('x')"
    with pytest.raises(OSError), live_report(folder, cfg, Console(enabled=False), program(code)):  # noqa: PT011
        raise OSError
    assert not (tmp_path / "made").exists()


def test_other_ranks_write_none(tmp_path: Path) -> None:
    folder = folder_in(tmp_path, writer=False)
    with live_report(folder, AT_END, Console(enabled=False)):
        pass
    assert not (folder.path / "report.html").exists()


def test_refreshed_while_the_run_goes_on_at_the_lowest_priority(tmp_path: Path) -> None:
    folder, seen = folder_in(tmp_path), tmp_path / "seen"
    # The priority is set just after the start.
    code = (
        "import os, sys, time; time.sleep(0.5)\n"
        f"open({str(seen)!r}, 'w').write(str(os.nice(0)) + ' ' + sys.argv[1])"
    )
    with live_report(folder, OFTEN, Console(enabled=False), program(code)):
        assert wait_for(seen) == f"19 {folder.path}"
        seen.unlink()
        wait_for(seen)
    assert os.nice(0) < 19


def test_a_report_that_fails_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_in(tmp_path)
    code = "import sys; sys.exit('first\\nValueError: too bad')"
    with live_report(folder, AT_END, Console(enabled=True), program(code)):
        pass
    with live_report(folder, AT_END, Console(enabled=True), ("no-such-program",)):
        pass
    first, second = capsys.readouterr().out.splitlines()
    assert first == "no report: ValueError: too bad"
    assert second.startswith("no report: ")
    assert "no-such-program" in second


def test_the_real_program_tells_why_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "absent", writer=True)
    with live_report(folder, AT_END, Console(enabled=True)):
        pass
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no report: ConfigError: - RUN: ")


def test_a_report_that_hangs_is_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_END_S", 0.3)
    code = "import time; time.sleep(60)"
    began = time.monotonic()
    with live_report(folder_in(tmp_path), AT_END, Console(enabled=True), program(code)):
        pass
    assert time.monotonic() - began < 20
    assert capsys.readouterr().out == "no report: not finished after 0.3 s\n"


def test_an_end_does_not_wait_for_a_refresh(tmp_path: Path) -> None:
    folder = folder_in(tmp_path)
    code = (
        "import os, sys, time\n"
        "open(f'{sys.argv[1]}/.report.html.{os.getpid()}.tmp', 'w')\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(60)"
    )
    began = time.monotonic()
    with live_report(folder, OFTEN, Console(enabled=False), program(code)):
        pid = int(wait_for(tmp_path / "pid"))
    assert time.monotonic() - began < 40
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not list(folder.path.glob(".*"))

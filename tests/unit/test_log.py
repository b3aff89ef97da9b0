"""Console, run folder, clock, metrics and manifest."""

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from osft_mcore.config.schema import LoggingConfig
from osft_mcore.errors import ConfigError
from osft_mcore.log.console import Console
from osft_mcore.log.manifest import manifest
from osft_mcore.log.metrics import Clock, MetricsLog
from osft_mcore.log.run_folder import RunFolder


def report(console: Console) -> None:
    console.say("[bold]100% [/] of it")
    console.table("scores", ["model", "pass@1"], [["base", "50.0%"], ["after OSFT", "70.5%"]])
    with console.steps("osft", 7, every=3) as progress:
        for step in range(1, 8):
            progress.finished(step, {"nll": 1.23456789, "lr": 1e-5})


def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    report(Console(enabled=True))
    output = capsys.readouterr().out
    assert "\x1b" not in output
    lines = output.splitlines()
    assert lines[0] == "[bold]100% [/] of it"
    steps = [line for line in lines if line.startswith("osft")]
    # Every third and the last.
    assert [line.split()[1] for line in steps] == ["3/7", "6/7", "7/7"]
    assert re.fullmatch(r"osft 3/7  nll 1\.235  lr 1e-05  elapsed \d+s, left \d+s", steps[0])
    assert any("after OSFT" in line and "70.5%" in line for line in lines)


def test_long_lines_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    text = "word " * 60
    Console(enabled=True).say(text)
    assert capsys.readouterr().out == text + "\n"


def test_other_ranks_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    report(Console(enabled=False))
    assert capfd.readouterr() == ("", "")


ON_A_TERMINAL = """
from osft_mcore.log.console import Console
console = Console(enabled=True, progress={progress})
with console.steps("osft", 4, every=1) as progress:
    for step in range(1, 5):
        progress.finished(step, {{"nll": 0.5}})
"""


def run_on_a_terminal(*, progress: bool) -> str:
    """Output of a program whose standard output is a pseudo-terminal."""
    ours, theirs = pty.openpty()
    code = ON_A_TERMINAL.format(progress=progress)
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, env=environment)
    os.close(theirs)
    output = b""
    # Reading from a terminal whose other end is closed is an error, not an empty read.
    while chunk := _read(ours):
        output += chunk
    os.close(ours)
    assert process.wait() == 0
    return output.decode()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""


def test_a_terminal_gets_a_progress_bar() -> None:
    output = run_on_a_terminal(progress=True)
    assert "\x1b[" in output
    assert "4/4" in output
    assert "nll 0.5" in output
    assert "elapsed" not in output


def test_a_terminal_gets_plain_lines_if_the_bar_is_off() -> None:
    output = run_on_a_terminal(progress=False)
    assert [line.split()[1] for line in output.splitlines()] == ["1/4", "2/4", "3/4", "4/4"]


def test_a_used_run_folder_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "run", writer=True)
    folder.check_unused()
    folder.create()
    folder.check_unused()
    folder.write_json("manifest.json", {})
    with pytest.raises(ConfigError, match=r"output_dir: .* already holds a run; choose another"):
        folder.check_unused()


def test_a_file_in_place_of_the_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir: .* is a file; expected a folder"):
        RunFolder(tmp_path / "run", writer=False).check_is_folder()


def test_files_are_written_and_nothing_temporary_stays(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, writer=True)
    folder.write_text("config.yaml", "seed: 1\n")
    folder.write_text("config.yaml", "seed: 2\n")
    folder.write_json("summary.json", {"a": [1, 2.5]})
    folder.write_lines("rollouts/step_1.jsonl", ({"row": i} for i in range(3)))
    folder.append_line("metrics.jsonl", {"step": 1})
    folder.append_line("metrics.jsonl", {"step": 2})
    assert {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*.*")} == {
        "config.yaml": "seed: 2\n",
        "summary.json": '{\n  "a": [\n    1,\n    2.5\n  ]\n}\n',
        "rollouts/step_1.jsonl": '{"row": 0}\n{"row": 1}\n{"row": 2}\n',
        "metrics.jsonl": '{"step": 1}\n{"step": 2}\n',
    }


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, writer=True)
    folder.write_text("config.yaml", "old")
    with pytest.raises(UnicodeEncodeError):
        folder.write_text("config.yaml", "new" * 10_000 + "\ud800")
    assert (tmp_path / "config.yaml").read_text() == "old"


def test_ranks_that_do_not_write_leave_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", writer=False)
    folder.create()
    folder.write_text("config.yaml", "")
    folder.write_lines("rollouts/step_1.jsonl", [{}])
    folder.append_line("metrics.jsonl", {})
    MetricsLog(folder, LoggingConfig(), {}).write(1, {"loss/nll": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_clock_adds_up_phases_per_step_and_per_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    times = iter([0.0, 1.0, 10.0, 12.0, 20.0, 23.0, 30.0, 34.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    for phase in ("rollout", "train", "rollout"):
        with clock(phase):
            pass
    assert clock.flush() == {"time/rollout_s": 4.0, "time/train_s": 2.0}
    assert clock.flush() == {}
    with clock("train"):
        pass
    assert clock.flush() == {"time/train_s": 4.0}
    assert clock.totals == {"rollout": 4.0, "train": 6.0}


def test_metrics_are_lines_of_json(tmp_path: Path) -> None:
    metrics = MetricsLog(RunFolder(tmp_path, writer=True), LoggingConfig(), {})
    metrics.write(1, {"loss/nll": 0.1 + 0.2})
    metrics.write(2, {"loss/nll": 1e-300})
    metrics.write_evaluation(2, {"eval/pass_at_1": 0.5})
    metrics.write_evaluation(2, {"eval/pass_at_1": 0.25})
    metrics.close()

    def lines(name: str) -> list[dict[str, float]]:
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    # At full precision: the file is the record that runs are compared by.
    expected = [{"step": 1, "loss/nll": 0.1 + 0.2}, {"step": 2, "loss/nll": 1e-300}]
    assert lines("metrics.jsonl") == expected
    assert [line["eval/pass_at_1"] for line in lines("evaluations.jsonl")] == [0.5, 0.25]


def test_wandb_offline_keeps_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    metrics = MetricsLog(
        RunFolder(tmp_path, writer=True),
        LoggingConfig(wandb=True, wandb_project="tiny"),
        {"train": {"lr": 0.5}},
    )
    assert wandb.run.project == "tiny"
    assert wandb.run.name == tmp_path.name
    assert wandb.run.config["train"] == {"lr": 0.5}
    metrics.write(1, {"loss/nll": 0.625})
    metrics.write_evaluation(1, {"eval/pass_at_1": 0.375})
    summary = dict(wandb.run.summary)
    metrics.close()
    assert (summary["step"], summary["loss/nll"], summary["eval/pass_at_1"]) == (1, 0.625, 0.375)
    assert wandb.run is None, "closed"
    assert len(list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))) == 1
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss/nll": 0.625}


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_wandb_that_breaks_is_off_and_the_run_goes_on(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the real package: a name that it refuses, or a run that is closed under our feet."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    console = Console(enabled=True)
    folder = RunFolder(tmp_path, writer=True)
    logging = LoggingConfig(wandb=True, wandb_project="no/name" if when == "init" else "tiny")
    metrics = MetricsLog(folder, logging, {"api_key": "abc123"}, console)
    if when != "init":
        assert wandb.run.config["api_key"] == "[redacted]"
    if when == "log":
        wandb.finish()
    if when == "finish":
        monkeypatch.setattr(wandb.run, "finish", None)
    metrics.write(1, {"loss/nll": 0.5})
    metrics.write_evaluation(1, {"eval/pass_at_1": 0.25})
    metrics.close()
    if when == "finish":
        monkeypatch.undo()
        wandb.finish()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "wandb is off" in line]
    assert f"osft report --sync wandb {tmp_path}" in line
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert len((tmp_path / "evaluations.jsonl").read_text().splitlines()) == 1


def test_manifest_says_what_made_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["osft", "train", "seed=3"])
    found = manifest(seed=3, world_size=2, details={"data_sha256": {"a": "b"}})
    assert json.loads(json.dumps(found)) == found
    assert (found["seed"], found["world_size"]) == (3, 2)
    assert found["command"] == ["osft", "train", "seed=3"]
    assert found["data_sha256"] == {"a": "b"}
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "megatron-core", "transformers", "safetensors"} <= found["packages"].keys()
    assert all(re.match(r"\d+\.\d+", version) for version in found["packages"].values())
    assert found["hardware"]["cpus"] == os.cpu_count()
    assert found["started"].endswith("+00:00")
    commit = found["git_commit"]
    assert commit is None or re.fullmatch(r"[\w.-]+(\+changes)?", commit)

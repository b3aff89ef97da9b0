"""`osft report --sync`: what goes to a tracker; wandb for real, without a network."""

import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import pytest
from run_folders import OPTIONS, step_row, write_lines, write_run

from osft_mcore import cli
from osft_mcore.report.replay import replayed
from osft_mcore.report.run import read_runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = [step_row(2), step_row(1) | {"loss/nll": math.nan}]
    folder = write_run(tmp_path / "run", rows=rows, options=OPTIONS | {"api_key": "abc123"})
    scores = [{"step": 0, "eval/temperature": 1.0, "eval/pass_at_1": 0.5},
              {"step": 0, "eval/temperature": 0.3, "eval/pass_at_1": 0.25},
              {"step": 2, "eval/temperature": 1.0, "eval/pass_at_1": 0.75}]  # fmt: skip
    write_lines(folder / "evaluations.jsonl", scores)
    return folder


def test_steps_in_order_and_finite_values_only(run: Path) -> None:
    rows = list(replayed(*read_runs([run])))
    assert [step for step, _ in rows] == [0, 0, 1, 2, 2]
    assert rows[0][1] == {"eval/temperature": 1.0, "eval/pass_at_1": 0.5}
    # Another temperature than that of the run must not end up in the same curve.
    assert rows[1][1]["eval_temperature_0.3/pass_at_1"] == 0.25
    assert "loss/nll" not in rows[2][1]
    assert rows[3][1] == {name: v for name, v in step_row(2).items() if name != "step"}


def test_wandb_offline(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert cli.main(["report", "--sync", "wandb", str(run)]) == 0
    assert capsys.readouterr().out == "sent to wandb: 2 steps, 3 evaluations\n"
    (kept,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    # wandb's own process writes the file, a moment later.
    deadline = time.monotonic() + 30
    while (content := kept.read_bytes()).count(b"loss/entropy") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert b"eval_temperature_0.3/pass_at_1" in content
    assert b"tau_sample" in content
    assert b"abc123" not in content
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", ["tensorboard", "swanlab", "trackio"])
def test_a_tracker_that_is_not_installed_is_named(
    run: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert cli.main(["report", "--sync", name, str(run)]) == 2
    said = capsys.readouterr().err
    assert f"the package {name} is not installed; install it (pip install {name})" in said


def test_a_tracker_that_fails_is_an_error_here(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A module in the tracker's place, that breaks as a service does which is down."""
    folder = run.parent / "modules"
    folder.mkdir()
    (folder / "trackio.py").write_text("def init(**_):\n    raise OSError('no route\\nto host')\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    assert cli.main(["report", "--sync", "trackio", str(run)]) == 2
    assert "--sync: trackio failed: OSError: no route to host" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["swanlab", "trackio"])
def test_what_a_module_tracker_gets(
    run: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A module that writes down its calls, by the names that the package documents."""
    folder = run.parent / "modules"
    folder.mkdir()
    (folder / f"{name}.py").write_text(
        "import json\ncalls = []\n"
        "def init(**options): calls.append(['init', options])\n"
        "def log(data, step): calls.append(['log', step, data])\n"
        f"def finish(): open({str(run / 'calls')!r}, 'w').write(json.dumps(calls))\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    assert cli.main(["report", "--sync", name, str(run)]) == 0
    calls = json.loads((run / "calls").read_text())
    assert calls[0][1]["project"] == "osft-mcore"
    assert calls[0][1]["config"]["api_key"] == "[redacted]"
    assert [call[1] for call in calls[1:]] == [0, 0, 1, 2, 2]
    assert calls[3][2]["loss/loss"] == 0.5

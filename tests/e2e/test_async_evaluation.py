"""Evaluation beside training, by the real program: same results, and either process may die."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from program import Outcome, forked, no_process_left, outcome, read_until, started
from toy_run import read_lines, write_start

NUM_STEPS = 4
# The probe is the inline run's alone: it asks the actor.
OPTIONS = [
    "train", "model.path=data/model", "model.dtype=fp32", "rollout.max_prompt_tokens=16",
    "rollout.max_response_tokens=20", "rollout.kv_cache_gib=0.05",
    "data.train=data/train.parquet", f"train.steps={NUM_STEPS}", "train.prompts_per_step=8",
    "train.prompts_per_update=4", "train.lr=5e-4", "train.lr_warmup_steps=0", "train.eps=1e-3",
    "evaluation.files=[data/eval.parquet]", "evaluation.every=1", "evaluation.num_samples=4",
    "evaluation.baseline_temperatures=[0]", "evaluation.probe=0",
    "report.at_end=false", "report.every_minutes=0",
]  # fmt: skip
ASYNC = [*OPTIONS, "evaluation.mode=async", f"evaluation.max_waiting={NUM_STEPS}"]
GONE_S = 5.0
Json = dict[str, Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs are; `inline` is there."""
    root = tmp_path_factory.mktemp("async_evaluation")
    write_start(root)
    with no_process_left():
        result = outcome(started([*OPTIONS, "output_dir=inline"], root), timeout_s=240.0)
        assert (result.code, result.err) == (0, ""), result
    return root


def trained(run: Path) -> list[Json]:
    """What the steps logged but times, rates and memory."""
    rows = read_lines(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def scored(run: Path) -> dict[str, bytes]:
    """All files of the evaluations, and the lines of the log."""
    files = [run / "evaluations.jsonl", *(run / "evaluations").iterdir()]
    return {file.name: file.read_bytes() for file in files}


def summary(run: Path) -> Json:
    return json.loads((run / "summary.json").read_text())


def assert_same(run: Path, other: Path) -> None:
    assert len(read_lines(run / "evaluations.jsonl")) == 2 + NUM_STEPS
    assert scored(run) == scored(other)
    assert trained(run) == trained(other)
    assert summary(run) | {"seconds": None} == summary(other) | {"seconds": None}
    weights = "hf/model.safetensors"
    assert (run / weights).read_bytes() == (other / weights).read_bytes()


def evaluator_of(run: "subprocess.Popen[str]") -> int:
    said = read_until(run, "evaluation: process ")
    [pid] = re.findall(r"evaluation: process (\d+)", said)
    return int(pid)


def is_alive(pid: int) -> bool:
    """Zombies count as dead: nobody may be there to wait for an orphan."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_nobody_starts_an_evaluator_by_hand(root: Path) -> None:
    result = forked(["follow", "inline"], root)
    assert result.code == 2
    assert "`osft train` starts it (evaluation.mode=async); by hand use" in result.err


def test_a_run_outlives_its_evaluator_and_tells_what_is_missing(root: Path) -> None:
    """It is killed while it starts; by then a snapshot waits, and there is room for no other."""
    with no_process_left():
        run = started([*ASYNC, "evaluation.max_waiting=1", "output_dir=widowed"], root)
        pid = evaluator_of(run)
        read_until(run, f"osft 3/{NUM_STEPS}")
        os.kill(pid, signal.SIGKILL)
        result = outcome(run, timeout_s=240.0)
    assert (result.code, result.err) == (0, ""), result
    assert "the evaluator has ended (ended by SIGKILL; its last words, '" in result.out
    assert "all others: widowed/evaluator.log)" in result.out
    lacking = summary(root / "widowed")["unscored"]
    full = "as many weights wait already as evaluation.max_waiting = 1 allows"
    assert [(at["step"], at["temperature"], at["reason"]) for at in lacking] == [
        (0, 0.0, "the evaluator had ended"),
        (0, 1.0, "the evaluator had ended"),
        (1, 1.0, "the evaluator had ended"),
        (2, 1.0, full),
        (3, 1.0, full),
        (4, 1.0, "the evaluator had ended"),
    ]
    assert f"not scored: step 3 at temperature 1: {full}" in result.out
    assert "to score them: osft evaluate --run widowed 'evaluation.steps=[0,4]'" in result.out
    command = ["evaluate", "--run", "widowed", "evaluation.steps=[0,4]", "--dry-run"]
    assert forked(command, root).code == 0
    assert "the weights after step 1, 2, 3 are in no checkpoint" in result.out
    for name in ("base_pass_at_1", "base_best_temperature", "osft_pass_at_1", "gain"):
        assert summary(root / "widowed")[name] is None, name
    assert not (root / "widowed" / "snapshots").exists()
    assert trained(root / "widowed") == trained(root / "inline")


def evaluator_gone(run: "subprocess.Popen[str]", evaluator: int, text: str = "") -> Outcome:
    """What the run ended with; killed when it says `text`, if there is one. Its evaluator is gone
    soon after."""
    if text:
        read_until(run, text)
        run.kill()
    result = outcome(run, timeout_s=240.0)
    deadline = time.monotonic() + GONE_S
    while is_alive(evaluator):
        assert time.monotonic() < deadline, "the evaluator has outlived its run"
        time.sleep(0.05)
    return result


def test_stopped_killed_and_left_alone_it_is_the_inline_run(root: Path) -> None:
    """No evaluator outlives its run, and what waits is scored by the next start."""
    command = [*ASYNC, "output_dir=interrupted", "checkpoint.every=1"]
    with no_process_left():
        first = started([*command, "checkpoint.stop_after=1s"], root)
        stopped = evaluator_gone(first, evaluator_of(first))
        assert stopped.code == 85, stopped
        assert "stopped after step 1 of 4 and saved it" in stopped.err
        assert "weights that wait to be scored when the run goes on: 1, in /" in stopped.out
        second = started(command, root)
        killed = evaluator_gone(second, evaluator_of(second), f"osft 2/{NUM_STEPS}")
        assert killed.code == -signal.SIGKILL
        result = outcome(started(command, root), timeout_s=240.0)
    assert (result.code, result.err) == (0, ""), result
    assert_same(root / "interrupted", root / "inline")
    assert "unscored" not in summary(root / "interrupted")
    assert not (root / "interrupted" / "snapshots").exists()
    log = (root / "interrupted" / "evaluator.log").read_text()
    assert "osft_mcore.cli follow interrupted\n" in log
    assert f"step {NUM_STEPS}, temperature 1: " in log

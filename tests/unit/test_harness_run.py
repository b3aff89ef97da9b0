"""The harness as a child: the real one on a tiny task and model, and programs that fail or hang."""

import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy_run import Start, toy_config, write_start

from osft_mcore.checkpoint.convert import hf_to_mcore
from osft_mcore.config.schema import ReportConfig, RunConfig
from osft_mcore.errors import ConfigError, HarnessError, NothingLeft, Stopped
from osft_mcore.evaluation.harness import Harness
from osft_mcore.log.console import Console
from osft_mcore.parallel.topology import Topology
from osft_mcore.train.harness import harness_errors, harness_results, run_harness

INSTALLED = all(importlib.util.find_spec(name) for name in ("lm_eval", "accelerate"))
ALONE = Topology(tp=1, pp=1, dp=1)
SILENT = Console(enabled=False)
STEP = 2
WORKS = """
import json, sys, yaml
from pathlib import Path
options = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
assert (Path(options["model_args"]["pretrained"]) / "model.safetensors").is_file()
found = {"lm_eval_version": "0", "results": {task: {"acc,none": 0.5} for task in options["tasks"]}}
Path(options["output_path"]).with_name("results_now.json").write_text(json.dumps(found))
"""
FAILS = "print('loading'); print('HF_TOKEN=hf_abcdefghijklmnopqrst'); raise SystemExit('no such')"


def program(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return write_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def trained(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint after two steps, whose weights are those of the start."""
    run = tmp_path_factory.mktemp("trained")
    (run / "manifest.json").write_text("{}")
    hf_to_mcore(
        start[1], run / "checkpoints" / f"step_{STEP}", topology=ALONE, vocab_multiple=64,
        dtype=None, target="safetensors", console=SILENT,
    )  # fmt: skip
    return run


@pytest.fixture
def config(start: Start, trained: Path, tmp_path: Path) -> RunConfig:
    """Scores of step 0 and of the checkpoint; the scoring itself is done."""
    config = toy_config(start, tmp_path / "scores", ALONE)
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "summary.json").write_text('{"pass_at_1": 0.25}')
    return replace(config, evaluation=replace(config.evaluation, run=str(trained), every=0))


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Sums to choose the result of, as a task file beside its data."""
    rows = [
        {"question": f"{n}+{n}=", "choices": [str(2 * n), str(2 * n + 1)], "label": 0}
        for n in range(6)
    ]
    data, file = tmp_path / "sums.jsonl", tmp_path / "tiny_sums.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "task": "tiny_sums", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "fewshot_split": "test", "output_type": "multiple_choice",
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1.5},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(options))
    return file


def at_steps(config: RunConfig, *steps: int) -> RunConfig:
    return replace(config, evaluation=replace(config.evaluation, steps=steps))


def summary_of(config: RunConfig) -> dict[str, Any]:
    return dict(json.loads((Path(config.output_dir) / "summary.json").read_text()))


@pytest.mark.skipif(not INSTALLED, reason="lm_eval is not installed: pip install -e '.[lm-eval]'")
def test_the_real_harness_scores_a_checkpoint(
    config: RunConfig, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    config = replace(at_steps(config, STEP), report=ReportConfig(at_end=True, every_minutes=0))
    (tmp_path / "scores" / "manifest.json").write_text('{"phase": "evaluate"}')
    asked = Harness(
        tasks=(str(task),), backend="hf", arguments=("--num_fewshot", "1", "--limit", "4")
    )
    assert harness_errors(config, asked) == ()
    run_harness(config, asked, SILENT)
    (kept,) = harness_results(Path(config.output_dir)).values()
    rows = {row["metric"]: row for row in kept["results"]}
    assert set(rows) == {"acc", "acc_norm"}
    for row in rows.values():
        assert row["value"] in (0, 0.25, 0.5, 0.75, 1)
        assert row["stderr"] is not None
        expected = {"task": "tiny_sums", "filter": "none", "num_fewshot": 1, "num_samples": 4}
        expected |= {"task_version": 1.5, "within": None, "higher_is_better": True}
        assert {name: row[name] for name in expected} == expected
    assert re.fullmatch(r"[\d.]+", kept["runs"][0]["version"])
    accuracy = {name: row["value"] for name, row in rows.items()}
    assert summary_of(config) == {
        "pass_at_1": 0.25, "lm_eval": {str(STEP): {"tiny_sums": accuracy}},
    }  # fmt: skip
    place = Path(config.output_dir) / kept["runs"][0]["folder"]
    assert "tiny_sums" in (place / "log.txt").read_text()
    # What was made of the checkpoint for it is gone.
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    assert "tiny_sums" in (tmp_path / "scores" / "report.html").read_text()
    with pytest.raises(NothingLeft):
        run_harness(config, asked, SILENT)


@pytest.mark.skipif(not INSTALLED, reason="lm_eval is not installed: pip install -e '.[lm-eval]'")
def test_a_task_that_the_harness_does_not_know_is_named(config: RunConfig, task: Path) -> None:
    """It ends so after it has read all of its tasks, which takes the real one ten seconds."""
    says = "import sys; print('Validating', sys.argv); print('Tasks not found: zebra'); sys.exit(1)"
    asked = Harness(tasks=("gsm8k", "zebra"), backend="hf")
    (error,) = harness_errors(config, asked, program(says))
    assert "--lm-eval: Tasks not found: zebra (python -m lm_eval ls tasks" in str(error)
    assert harness_errors(config, asked, program("pass")) == ()
    # A file is no name.
    assert harness_errors(config, replace(asked, tasks=(str(task),)), program(says)) == ()


def test_what_is_done_is_not_done_again(config: RunConfig) -> None:
    asked = Harness(tasks=("one",), backend="hf")
    run_harness(at_steps(config, STEP), asked, SILENT, program(WORKS))
    more = replace(asked, tasks=("one", "two"))
    run_harness(config, more, SILENT, program(WORKS))
    kept = harness_results(Path(config.output_dir))
    assert {step: [run["tasks"] for run in at["runs"]] for step, at in kept.items()} == {
        0: [["one", "two"]], STEP: [["one"], ["two"]],
    }  # fmt: skip
    tasks = {"one": {"acc": 0.5}, "two": {"acc": 0.5}}
    assert summary_of(config)["lm_eval"] == {"0": tasks, str(STEP): tasks}
    with pytest.raises(NothingLeft):
        run_harness(config, more, SILENT, program(FAILS))


def test_a_child_that_fails_says_why_and_what_is_done_stays(config: RunConfig) -> None:
    asked = Harness(tasks=("one",), backend="hf")
    run_harness(at_steps(config, 0), asked, SILENT, program(WORKS))
    with pytest.raises(HarnessError) as caught:
        run_harness(config, asked, SILENT, program(FAILS))
    text = str(caught.value)
    assert caught.value.exit_code == 9
    assert "ended with code 1, step 2, tasks one" in text
    assert "loading" in text
    assert "no such" in text
    log = Path(re.findall(r"them are in (\S+):", text)[0])
    assert log.read_text().splitlines()[-1] == "no such"
    assert "hf_abc" not in text + log.read_text()
    assert list(harness_results(Path(config.output_dir))) == [0]
    with pytest.raises(HarnessError, match="left no results"):
        run_harness(config, asked, SILENT, program("print('nothing')"))
    # The third start does what the others have not, with the export that they have made.
    run_harness(config, asked, SILENT, program(WORKS))
    kept = harness_results(Path(config.output_dir))
    assert kept[STEP]["runs"][0]["folder"] == f"lm_eval/step_{STEP}/run_3"


def test_told_to_stop_it_ends_the_child(config: RunConfig, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    hangs = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(600)"

    def stop() -> None:
        while not (mark.is_file() and mark.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(Stopped, match="SIGTERM; stopped while lm-eval ran"):
        run_harness(config, Harness(tasks=("one",), backend="hf"), SILENT, program(hangs))
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (Path(config.output_dir) / "run.lock").exists()


def refusal(config: RunConfig, asked: Harness) -> str:
    with pytest.raises(ConfigError) as caught:
        run_harness(config, asked, SILENT, program(FAILS))
    return "\n".join(caught.value.problems)


def test_other_arguments_tasks_or_weights_are_refused(
    config: RunConfig, task: Path, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    evaluation = replace(config.evaluation, run=str(tmp_path / "run"), steps=(STEP,))
    config = replace(config, evaluation=evaluation)
    asked = Harness(tasks=(str(task),), backend="hf", arguments=("--limit", "3"))
    run_harness(config, asked, SILENT, program(WORKS))
    assert "were made with {'model': 'hf', 'arguments': ['--limit', '3']}" in refusal(
        config, replace(asked, arguments=("--limit", "4"))
    )
    task.write_text(task.read_text() + "num_fewshot: 2\n")
    assert "is not as it was for the numbers in" in refusal(config, asked)
    manifest = tmp_path / "run" / "checkpoints" / f"step_{STEP}" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    assert "has numbers of other weights of step 2" in refusal(config, asked)


def test_a_folder_of_tasks_may_not_change(
    config: RunConfig, task: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    arguments = ("--include_path", str(task.parent))
    asked = Harness(tasks=("tiny_sums",), backend="hf", arguments=arguments)
    # Not beside the tasks, whose folder must stay as it is.
    config = replace(at_steps(config, 0), output_dir=str(tmp_path_factory.mktemp("scores")))
    run_harness(config, asked, SILENT, program(WORKS))
    with pytest.raises(NothingLeft):
        run_harness(config, asked, SILENT, program(FAILS))
    (task.parent / "sums.jsonl").write_text("")
    assert "include_path_sha256" in refusal(config, asked)


def test_random_weights_have_no_files(config: RunConfig) -> None:
    random = replace(config, model=replace(config.model, init="random"))
    asked = Harness(tasks=("one",), backend="hf")
    assert refusal(random, asked).endswith("leave step 0 out (evaluation.steps)")
    run_harness(at_steps(random, STEP), asked, SILENT, program(WORKS))


def test_what_is_missing_is_named_before_anything_is_built(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Harness(tasks=("a.yaml",), backend="hf", arguments=("--include_path", "nowhere"))
    for name in ("lm_eval", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)
    (error,) = harness_errors(config, asked, program(FAILS))
    assert isinstance(error, ConfigError)
    assert [problem.split("; install")[0] for problem in error.problems] == [
        "--lm-eval: the package lm_eval is not installed",
        "--lm-eval: the package accelerate is not installed",
        "--lm-eval: 'a.yaml' is not a file",
        "--lm-eval-args: --include_path 'nowhere' is not a folder",
    ]
    assert "pip install -e '.[lm-eval]'" in error.problems[0]

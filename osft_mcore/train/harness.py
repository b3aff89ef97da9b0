"""`osft evaluate --lm-eval`: lm-evaluation-harness on every model that was scored."""

import hashlib
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

import yaml

from osft_mcore.checkpoint.convert import mcore_to_hf
from osft_mcore.config.schema import RunConfig
from osft_mcore.data.parquet import data_sha256
from osft_mcore.errors import ConfigError, HarnessError, NothingLeft, OsftError, Stopped
from osft_mcore.evaluation.harness import (
    Harness,
    merged,
    metric_name,
    options_file,
    result_rows,
    summary,
)
from osft_mcore.log.console import Console
from osft_mcore.log.lock import run_lock
from osft_mcore.log.redact import redacted_text
from osft_mcore.log.run_folder import REPORT, RunFolder
from osft_mcore.parallel.launch import end_group
from osft_mcore.parallel.world import job_attempt, job_id
from osft_mcore.train.live_report import AT_END_S, write_report
from osft_mcore.train.live_report import PROGRAM as REPORT_PROGRAM
from osft_mcore.train.resume import SUMMARY, read_json
from osft_mcore.train.scored import Scored, scored_models

PACKAGE: Final = "lm_eval"
PROGRAM: Final = (sys.executable, "-m", PACKAGE)
NEEDED: Final = {"hf": (PACKAGE, "accelerate"), "vllm": (PACKAGE,)}
FOLDER: Final = "lm_eval"
"""Of the run folder: what the harness wrote itself, by step and start."""
LOG: Final = "log.txt"
LAST_LINES: Final = 12
STOP: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
TASK_FILES: Final = (".yaml", ".yml", ".py", ".json", ".jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One model, and the tasks that it has not done."""

    scored: Scored
    tasks: tuple[str, ...]


def harness_results(folder: Path) -> dict[int, dict[str, Any]]:
    """What a folder of scores holds of the harness, by step."""
    found = {}
    for file in sorted((folder / "evaluations").glob("step_*_lm_eval.json")):
        kept = read_json(file)
        found[int(kept["step"])] = kept
    return dict(sorted(found.items()))


def harness_errors(
    config: RunConfig, harness: Harness, program: Sequence[str] = PROGRAM
) -> tuple[OsftError, ...]:
    """What would stop the harness, before anything is built; not collective."""
    problems = [
        f"--lm-eval: the package {name} is not installed; install it with "
        "pip install -e '.[lm-eval]'"
        for name in NEEDED[harness.backend]
        if importlib.util.find_spec(name) is None
    ]
    files = [task for task in harness.tasks if task.endswith(".yaml")]
    problems += [f"--lm-eval: {file!r} is not a file" for file in files if not Path(file).is_file()]
    if harness.include_path and not Path(harness.include_path).is_dir():
        problems.append(f"--lm-eval-args: --include_path {harness.include_path!r} is not a folder")
    if problems:
        return (ConfigError(problems),)
    try:
        work = _work_left(config, harness)
    except ConfigError as error:
        return (error,)
    if work and (unknown := _unknown_tasks(harness, program)):
        return (ConfigError(f"--lm-eval: {unknown} (python -m lm_eval ls tasks prints all)"),)
    return ()


def run_harness(
    config: RunConfig, harness: Harness, console: Console, program: Sequence[str] = PROGRAM
) -> None:
    """Run the tasks that are not done on every model; keep numbers, logs and a new report.

    One process, without ranks: the engines that scored are gone, and their memory is free. Raises
    HarnessError if a start fails, Stopped if it was told to stop: what is done stays, and the same
    command goes on from there; NothingLeft if everything was done.
    """
    work, folder = _work_left(config, harness), RunFolder(config.output_dir, writer=True)
    if not work:
        raise NothingLeft(
            f"the scores and the numbers of --lm-eval are in {folder.path / SUMMARY}; to score "
            "anew choose another output_dir"
        )
    lock = run_lock(folder.path, job_id=job_id(), attempt=job_attempt())
    with _told_to_stop(), lock:
        for item in work:
            _run_step(config, harness, item, folder, console, program)
        _tell(folder, console)
        if config.report.at_end:
            command = [*REPORT_PROGRAM, str(folder.path)]
            failure = write_report(command, folder.path, AT_END_S, threading.Event())
            console.say(failure or f"report: {folder.path / REPORT}")


def _work_left(config: RunConfig, harness: Harness) -> list[Work]:
    """In the order of steps. Raises ConfigError if what is there was made otherwise."""
    kept, problems, work = harness_results(Path(config.output_dir)), [], []
    asked = _identity(harness)
    for scored in scored_models(config):
        done = kept.get(scored.step)
        if done is not None and done["made_with"] != asked:
            problems.append(
                f"--lm-eval-args: the numbers of step {scored.step} in {config.output_dir!r} were "
                f"made with {done['made_with']}, now it is {asked}; restore that, or choose "
                "another output_dir"
            )
        elif done is not None and done["weights"] != scored.fingerprint(config):
            problems.append(
                f"output_dir: {config.output_dir!r} has numbers of other weights of step "
                f"{scored.step}; choose another one"
            )
        runs = done["runs"] if done else []
        hashes = {file: digest for run in runs for file, digest in run["files"].items()}
        problems += [
            f"--lm-eval: {file!r} is not as it was for the numbers in {config.output_dir!r}; "
            "choose another output_dir"
            for file, digest in _task_hashes(harness.tasks).items()
            if hashes.get(file, digest) != digest
        ]
        before = {task for run in runs for task in run["tasks"]}
        if left := tuple(task for task in harness.tasks if task not in before):
            work.append(Work(scored=scored, tasks=left))
    if config.model.init == "random" and any(
        at.scored.checkpoint is None and at.scored.exported is None for at in work
    ):
        problems.append(
            "--lm-eval: with model.init=random there are no files of the starting model's weights "
            "for the harness to load; leave step 0 out (evaluation.steps)"
        )
    if problems:
        raise ConfigError(problems)
    return work


def _identity(harness: Harness) -> dict[str, Any]:
    """What numbers in one folder share: all that decides them, but weights and tasks."""
    made_with: dict[str, Any] = {
        "model": harness.backend,
        "arguments": [redacted_text(argument) for argument in harness.arguments],
    }
    if harness.include_path:
        inside = sorted(Path(harness.include_path).rglob("*"))
        files = [file for file in inside if file.suffix in TASK_FILES and file.is_file()]
        contents = b"".join(file.read_bytes() for file in files)
        made_with["include_path_sha256"] = hashlib.sha256(contents).hexdigest()
    return made_with


def _task_hashes(tasks: Sequence[str]) -> dict[str, str]:
    """Of those that are files."""
    return {task: data_sha256(task) for task in tasks if task.endswith(".yaml")}


def _unknown_tasks(harness: Harness, program: Sequence[str]) -> str:
    """What the harness itself says of names that it does not know; empty if it knows them all."""
    names = [task for task in harness.tasks if not task.endswith(".yaml") and "*" not in task]
    if not names:
        return ""
    more = ["--include_path", harness.include_path] if harness.include_path else []
    command = [*program, "validate", "--tasks", ",".join(names), *more]
    ran = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
        check=False,
    )  # fmt: skip
    if ran.returncode == 0:
        return ""
    lines = (ran.stdout.strip() or ran.stderr.strip() or "it ended without a word").splitlines()
    return redacted_text(lines[-1])


def _run_step(
    config: RunConfig,
    harness: Harness,
    work: Work,
    folder: RunFolder,
    console: Console,
    program: Sequence[str],
) -> None:
    step, began = work.scored.step, time.monotonic()
    root = folder.path / FOLDER / f"step_{step}"
    number = 1
    while (place := root / f"run_{number}").exists():
        number += 1
    model = _model_files(config, work.scored, root, console)
    place.mkdir(parents=True)
    options = options_file(
        harness, work.tasks, model=str(model), dtype=config.model.dtype, tp=config.rollout.tp,
        output=str(place / "results.json"), trust_remote_code=config.model.trust_remote_code,
    )  # fmt: skip
    (place / "config.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    console.say(f"lm-eval: step {step}, {', '.join(work.tasks)}; log: {place / LOG}")
    command = [*program, "run", "--config", str(place / "config.yaml"), *harness.arguments]
    code, last = _run_child(command, place / LOG)
    files = sorted(place.glob("results_*.json"))
    if code != 0 or not files:
        ending = f"ended with code {code}" if code else "left no results"
        raise HarnessError(
            f"lm-eval {ending}, step {step}, tasks {', '.join(work.tasks)}; its last lines, all of "
            f"them are in {place / LOG}:\n" + "\n".join(last)
        )
    seconds = round(time.monotonic() - began, 1)
    _keep(config, harness, work, folder, place, _own_results(files[-1]), seconds)
    if work.scored.checkpoint is not None:
        # As large as the model, and made again of the checkpoint in no time.
        shutil.rmtree(model)


def _keep(
    config: RunConfig,
    harness: Harness,
    work: Work,
    folder: RunFolder,
    place: Path,
    found: dict[str, Any],
    seconds: float,
) -> None:
    """Add what one start found, its own files being in `place`, to what is known of its step."""
    step = work.scored.step
    before = harness_results(folder.path).get(step, {})
    run = {
        "tasks": list(work.tasks),
        "files": _task_hashes(work.tasks),
        "version": str(found.get("lm_eval_version", "unknown")),
        "folder": str(place.relative_to(folder.path)),
        "seconds": seconds,
    }
    folder.write_json(
        f"evaluations/step_{step}_lm_eval.json",
        {
            "step": step,
            "weights": work.scored.fingerprint(config),
            "made_with": _identity(harness),
            "runs": [*before.get("runs", ()), run],
            "results": merged(before.get("results", ()), result_rows(found)),
        },
    )


def _own_results(file: Path) -> dict[str, Any]:
    """The harness's own file, from now on without what looks like a secret."""
    text = redacted_text(file.read_text(encoding="utf-8"))
    file.write_text(text, encoding="utf-8")
    try:
        found = json.loads(text)
        result_rows(found)
    except (ValueError, AttributeError) as error:
        raise HarnessError(f"{file} is no results file of lm-eval: {error}") from error
    return dict(found)


def _model_files(config: RunConfig, scored: Scored, root: Path, console: Console) -> Path:
    """A Hugging Face folder with these weights; of a checkpoint it is made first."""
    if scored.exported is not None:
        return scored.exported
    if scored.checkpoint is None:
        return Path(config.model.path)
    out = root / "hf"
    if not out.exists():
        # It appears when it is whole; what an interrupted start has made is gone on with.
        mcore_to_hf(
            scored.checkpoint, out, hf_config=None, dtype=None,
            max_shard_bytes=config.checkpoint.max_shard_bytes, hashes=False, console=console,
        )  # fmt: skip
    return out


def _run_child(command: Sequence[str], log: Path) -> tuple[int, list[str]]:
    """Its exit code and last lines; it and what it started end with this call."""
    last: deque[str] = deque(maxlen=LAST_LINES)
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        try:
            assert child.stdout is not None, "stdout was asked to be a pipe"
            for line in child.stdout:
                if text := redacted_text(line.rstrip()):
                    file.write(text + "\n")
                    file.flush()
                    last.append(text)
            return child.wait(), list(last)
        finally:
            end_group(child)


@contextmanager
def _told_to_stop() -> Iterator[None]:
    """Inside, signals raise Stopped, and SIGINT KeyboardInterrupt: the launcher only notes them."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(
            f"{signal.Signals(number).name}; stopped while lm-eval ran; the same command goes on "
            "after the last step that is done"
        )

    handlers: dict[signal.Signals, Any] = dict.fromkeys(STOP, stop)
    handlers[signal.SIGINT] = signal.default_int_handler
    before = {
        number: signal.signal(number, handler)
        for number, handler in handlers.items()
        # What the shell that started this ignores (nohup) stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(folder: RunFolder, console: Console) -> None:
    """Into the summary, and as a table."""
    found = harness_results(folder.path)
    if (folder.path / SUMMARY).is_file():
        before = dict(read_json(folder.path / SUMMARY))
        folder.write_json(SUMMARY, before | {"lm_eval": summary(found)})
    rows = [
        [
            str(row["task"]), str(step), metric_name(row),
            "none" if row["value"] is None else f"{row['value']:.4g}",
            "" if row["stderr"] is None else f"{row['stderr']:.2g}",
        ]
        for step, kept in found.items()
        for row in kept["results"]
        if row["within"] is None
    ]  # fmt: skip
    console.table("lm-evaluation-harness", ["task", "step", "metric", "value", "stderr"], rows)

"""Limits of time: which there are, and when a run must stop to keep them."""

import pytest

from osft_mcore.cli import main
from osft_mcore.errors import ConfigError
from osft_mcore.parallel.stop import Deadline, deadline
from osft_mcore.parallel.world import (
    PROGRAM_START,
    check_launch_environment,
    check_started_once,
    job_attempt,
    job_end,
    job_id,
    knows_run_start,
    run_start,
)

NOW = 1_000_000.0


def near(limits: Deadline, *, step_s: float = 10.0, save_s: float = 5.0) -> str:
    return limits.near(NOW, longest_step_s=step_s, longest_save_s=save_s)


@pytest.mark.parametrize(
    ("left", "step_s", "save_s", "stops"),
    [
        (30, 10, 5, False),
        (29.9, 10, 5, True),
        (29.9, 10, 0, False),
        (29.9, 14.9, 0, False),
        (19.9, 10, 0, True),
        (9.9, 0, 5, True),
        (0, 0, 0, False),
        (-1, 0, 0, True),
    ],
)
def test_another_step_and_a_save_must_fit_in_twice(
    left: float, step_s: float, save_s: float, stops: bool
) -> None:
    job, run = (
        Deadline(job_end=NOW + left, run_end=None),
        Deadline(job_end=None, run_end=NOW + left),
    )
    for limits in (job, run):
        assert bool(near(limits, step_s=step_s, save_s=save_s)) == stops


def test_the_reason_names_the_limit_and_what_is_left() -> None:
    soon, later = NOW + 13, NOW + 4000
    assert near(Deadline(job_end=soon, run_end=later)) == "SLURM_JOB_END_TIME in 13 s"
    assert near(Deadline(job_end=later, run_end=soon)) == "checkpoint.stop_after in 13 s"
    assert near(Deadline(job_end=NOW - 7, run_end=None)) == "SLURM_JOB_END_TIME 7 s ago"
    assert near(Deadline(job_end=later, run_end=None)) == ""
    assert near(Deadline(job_end=None, run_end=None), step_s=1e9) == ""


def test_where_the_limits_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert deadline(None) == Deadline(job_end=None, run_end=None)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1790000000")
    limits = deadline("1h30m", started=NOW)
    assert limits == Deadline(job_end=1_790_000_000.0, run_end=NOW + 5400)


def test_ranks_that_are_started_again_do_not_get_the_whole_time_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began = int(PROGRAM_START) - 3000
    monkeypatch.setenv("OSFT_STARTED", str(began))
    assert deadline("1h30m").run_end == began + 5400
    monkeypatch.delenv("OSFT_STARTED")
    assert deadline("1h30m").run_end == PROGRAM_START + 5400


@pytest.mark.parametrize(
    ("environ", "known"),
    [
        ({}, True),
        ({"TORCHELASTIC_RESTART_COUNT": "0"}, True),
        ({"TORCHELASTIC_RESTART_COUNT": "2"}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "2", "OSFT_STARTED": "1790000000"}, True),
    ],
)
def test_who_knows_when_the_run_began(environ: dict[str, str], known: bool) -> None:
    assert knows_run_start(environ) is known


def test_what_slurm_announces() -> None:
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_END_TIME": "1790000000"}
    assert (job_id(job), job_end(job)) == ("4711", 1_790_000_000.0)
    assert (job_id({}), job_end({})) == (None, None)
    empty = dict.fromkeys(job, "")
    assert (job_id(empty), job_end(empty)) == (None, None)


def test_a_run_began_before_its_ranks_did() -> None:
    assert run_start({}) == run_start({"OSFT_STARTED": ""}) == PROGRAM_START
    assert run_start({"OSFT_STARTED": "1790000000"}) == min(1_790_000_000.0, PROGRAM_START)
    assert run_start({"OSFT_STARTED": f"{PROGRAM_START - 60:.0f}"}) < PROGRAM_START
    assert run_start({"OSFT_STARTED": f"{PROGRAM_START + 60:.0f}"}) == PROGRAM_START


def test_which_start_of_the_job_this_is() -> None:
    assert (job_attempt({}), job_attempt({"SLURM_RESTART_COUNT": "2"})) == ("", "2")


@pytest.mark.parametrize(
    ("environ", "refused"),
    [
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, True),
        # A batch script of a job with eight tasks.
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, False),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, False),
        # A torchrun a node.
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "RANK": "9"}, False),
        ({}, False),
    ],
)
def test_tasks_that_would_all_start_all_ranks_are_refused(
    environ: dict[str, str], refused: bool
) -> None:
    if not refused:
        check_started_once(environ)
        return
    with pytest.raises(ConfigError, match=r"srun starts this program 8 times.*train\.sbatch"):
        check_started_once(environ)


def test_such_tasks_end_before_a_rank_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.delenv("RANK", raising=False)
    assert main(["train", "--dry-run", "experiment=arithmetic_osft"]) == ConfigError.exit_code
    assert "SLURM_STEP_NUM_TASKS: found 4" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SLURM_JOB_END_TIME", "OSFT_STARTED"])
@pytest.mark.parametrize("text", ["soon", "2026-01-31T08:00:00", "nan", "inf"])
def test_what_is_no_time_is_refused_before_a_rank_starts(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    for ask in (job_end if name == "SLURM_JOB_END_TIME" else run_start, check_launch_environment):
        with pytest.raises(ConfigError, match=rf"{name}: found '{text}'"):
            ask()

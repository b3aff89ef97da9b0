"""Options of asynchronous evaluation: what they name, and what of them cannot work."""

import os
from dataclasses import replace
from typing import Any

import pytest

from osft_mcore.config.check_async import Host, async_problems
from osft_mcore.config.evaluation import cores, gpus, of_evaluator, start_temperatures
from osft_mcore.config.schema import (
    LoggingConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
)
from osft_mcore.config.schema_evaluation import EvaluationConfig
from osft_mcore.parallel.world import PARENT, variables_of_child, visible_gpus

HOST = Host(cores=frozenset(range(8)), gpus=tuple(map(str, range(8))), num_ranks=None)


def run(*, tp: int = 1, dp: int = 1, **evaluation: Any) -> RunConfig:
    return RunConfig(
        parallel=ParallelConfig(dp=dp),
        rollout=RolloutConfig(tp=tp),
        evaluation=EvaluationConfig(**{"files": ("a.parquet",), "mode": "async"} | evaluation),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", ()), ("3", (3,)), ("4-7", (4, 5, 6, 7)), ("0, 4-5,9", (0, 4, 5, 9)), ("2-2", (2,))],
)
def test_cores(text: str, expected: tuple[int, ...]) -> None:
    assert cores(text) == expected


@pytest.mark.parametrize(
    "text", ["a", "1-", "-1", "4-2", "1,,2", "1.5", "1,2-3,3", "0x1", "0-10000000000"]
)
def test_what_names_no_cores(text: str) -> None:
    with pytest.raises(ValueError, match=f"found '{text}', expected"):
        cores(text)


def test_gpus() -> None:
    assert gpus("") == ()
    assert gpus("6, 7") == ("6", "7")
    assert gpus("GPU-1a2b") == ("GPU-1a2b",)


@pytest.mark.parametrize(
    ("config", "device", "expected"),
    [
        (run(), "cpu", None),
        (run(devices="4-7"), "cpu", None),
        (run(devices="6-9"), "cpu", "may not use the CPU cores 8, 9"),
        (run(devices="x"), "cpu", "expected numbers of CPU cores"),
        (run(), "cuda", "expected as many GPUs as rollout.tp = 1"),
        (run(devices="7", dp=7), "cuda", None),
        (run(devices="6,7", tp=2, dp=6), "cuda", None),
        (run(devices="7", tp=2, dp=6), "cuda", "expected as many GPUs as rollout.tp = 2"),
        (run(devices="7", dp=8), "cuda", "but ranks of this run use 7"),
        (run(devices="6,6", tp=2, dp=6), "cuda", "expected different GPUs"),
        (run(devices="6,", tp=2, dp=6), "cuda", "expected different GPUs"),
        (run(files=()), "cpu", "evaluation.files is empty"),
        (run(snapshots="shm"), "cpu", "expected an absolute path"),
        (run(snapshots="/no/such/folder"), "cpu", "is not a folder"),
        # Not even root may make a folder there.
        (run(snapshots="/proc"), "cpu", "evaluation.snapshots: '/proc' cannot be written: "),
        (run(snapshots="/dev/shm"), "cpu", None),
        (run(mode="inline", devices="7"), "cuda", "evaluation.devices: it is for"),
        (run(mode="inline", snapshots="/dev/shm"), "cpu", "evaluation.snapshots: it is for"),
        (run(mode="inline"), "cuda", None),
    ],
)
def test_what_cannot_work(config: RunConfig, device: str, expected: str | None) -> None:
    problems = list(async_problems(config, device, HOST))
    assert len(problems) == (expected is not None), problems
    assert expected is None or expected in problems[0]


def test_everything_is_told_at_once() -> None:
    problems = list(async_problems(run(files=(), snapshots="x", devices="0"), "cuda", HOST))
    assert [line.split(":")[0] for line in problems] == [
        "evaluation.mode", "evaluation.snapshots", "evaluation.devices",
    ]  # fmt: skip


def test_ranks_take_the_first_gpus_of_those_that_they_see() -> None:
    config = run(devices="0", dp=2)
    elsewhere = replace(HOST, gpus=visible_gpus({"CUDA_VISIBLE_DEVICES": "3, 2,0"}))
    assert elsewhere.gpus == ("3", "2", "0")
    assert list(async_problems(config, "cuda", elsewhere)) == []
    three = replace(elsewhere, num_ranks=3)
    [problem] = async_problems(config, "cuda", three)
    assert "but ranks of this run use 0" in problem


def test_a_dry_run_does_not_look_at_the_machine() -> None:
    assert list(async_problems(run(devices="100-103"), "cpu", None)) == []
    assert list(async_problems(run(devices="0", snapshots="/no/such"), "cuda", None)) == []


def test_the_starting_model_is_scored_at_the_evaluation_temperature_first() -> None:
    evaluation = EvaluationConfig(temperature=0.7, baseline_temperatures=(0.0, 0.7, 1.0))
    assert start_temperatures(evaluation) == (0.7, 0.0, 1.0)
    assert start_temperatures(replace(evaluation, before=False)) == ()


def test_the_evaluator_has_the_ranks_of_one_engine_and_no_tracker() -> None:
    config = replace(run(tp=2, dp=8), logging=LoggingConfig(wandb=True, every=3))
    found = of_evaluator(config)
    assert found.parallel.world_size == found.rollout.tp == 2
    assert (found.logging.wandb, found.logging.every) == (False, 3)
    assert found.evaluation == config.evaluation


def test_a_child_has_a_world_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "MINE"):
        monkeypatch.setenv(name, "1")
    found = variables_of_child({"CUDA_VISIBLE_DEVICES": "7"})
    assert found["MINE"] == "1"
    assert (found["CUDA_VISIBLE_DEVICES"], found[PARENT]) == ("7", str(os.getpid()))
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & {*found}

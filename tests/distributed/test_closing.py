"""Ended between the last step and the end, or before the first step: what is done again."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RanksFailed, run_ranks
from test_resume import answers, figures
from test_skipped_updates import inject
from torch_engine import TorchEngine, build_torch_engine
from toy_run import Start, read_lines, toy_config, write_start

from osft_mcore.checkpoint.folder import checkpoints_in
from osft_mcore.config.schema import CheckpointConfig, RunConfig
from osft_mcore.errors import OsftError
from osft_mcore.log.console import Console
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.stop import Deadline
from osft_mcore.parallel.topology import Topology
from osft_mcore.records import Prompt, Response, Sampling
from osft_mcore.train import checkpoints
from osft_mcore.train.osft import open_loop, run_osft

NUM_STEPS = 3
TP1 = Topology(tp=1, pp=1, dp=1)
TP2 = Topology(tp=2, pp=1, dp=1, rollout_tp=2)


def config_of(start: Start, out: Path, topology: Topology, **options: Any) -> RunConfig:
    config = toy_config(start, out, topology)
    return replace(
        config,
        train=replace(config.train, steps=NUM_STEPS, prompts_per_step=4, prompts_per_update=2),
        evaluation=replace(config.evaluation, every=0, num_samples=1),
        checkpoint=CheckpointConfig(**{"every": 2, "keep_last": 1, **options}),
    )


class SignalledEngine(TorchEngine):
    """Sends a signal to its own process when it is asked for an evaluation after `step`."""

    step: int
    number: signal.Signals
    rank: int

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Response]:
        is_evaluation = not sampling.logprobs
        if is_evaluation and (sampling.step, self.context.rank) == (self.step, self.rank):
            os.kill(os.getpid(), self.number)
        return super().generate(prompts, sampling)


def program(
    rank: int,
    config: RunConfig,
    topology: Topology,
    step: int = -1,
    number: signal.Signals = signal.SIGKILL,
    faults: dict[int, str] | None = None,
    delay_s: float = 0.0,
) -> str:
    """The run, its last rank signalled while the model of `step` is evaluated; its last words.

    A rank's part of a checkpoint takes `delay_s` longer.
    """
    context = join_groups(topology, device=torch.device("cpu"))
    inject(faults or {})
    real = checkpoints.write_part

    def write_part(*args: Any) -> None:
        time.sleep(delay_s)
        real(*args)

    checkpoints.write_part = write_part

    def build(*args: Any) -> TorchEngine:
        engine = build_torch_engine(*args)
        engine.__class__ = SignalledEngine
        engine.step, engine.number, engine.rank = step, number, topology.world_size - 1
        return engine

    try:
        run_osft(config, context, Console(enabled=rank == 0, progress=False), build)
    except OsftError as error:
        return f"{error.exit_code} {error}"
    return ""


def finish(config: RunConfig, topology: Topology = TP1) -> None:
    assert set(run_ranks(program, topology.world_size, config=config, topology=topology)) == {""}


def killed_in_closing(config: RunConfig, **options: Any) -> None:
    with pytest.raises(RanksFailed, match="died with status 9"):
        run_ranks(program, 1, config=config, topology=TP1, step=NUM_STEPS, **options)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return write_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def undisturbed(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(config_of(start, out, TP1))
    return out


def times(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (run / "rollouts").iterdir()}


@pytest.mark.parametrize("background", [True, False])
def test_killed_in_the_closing_evaluation_only_that_is_done_again(
    start: Start,
    undisturbed: Path,
    tmp_path: Path,
    background: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The last step is saved although it is no multiple of checkpoint.every, and in time."""
    out = tmp_path / "run"
    config = config_of(start, out, TP1, async_=background)
    killed_in_closing(config, delay_s=1.0)
    assert [path.name for path in checkpoints_in(out / "checkpoints")] == ["step_3"]
    assert [row["step"] for row in read_lines(out / "evaluations.jsonl")] == [0, 0]
    before = times(out)
    finish(config)
    assert "going on from" in (said := capfd.readouterr().out)
    assert "3 of 3 steps are done" in said
    assert times(out) == before, "no step was done again"
    assert figures(out) == figures(undisturbed)
    assert answers(out) == answers(undisturbed)


def test_without_checkpoints_all_is_done_again_and_the_model_is_kept(
    start: Start,
    undisturbed: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    config = config_of(start, out, TP1, every=0)
    killed_in_closing(config)
    assert not (out / "checkpoints").exists()
    finish(config)
    aside = out / "unfinished_1"
    assert f"what it left is in {aside}, with the final model in hf/" in capfd.readouterr().out
    assert (aside / "hf" / "manifest.json").is_file()
    assert figures(out) == figures(undisturbed)


def test_a_last_step_whose_update_was_skipped_is_saved_beside_the_one_before(
    start: Start,
    tmp_path: Path,
) -> None:
    """Two updates a step: 6 is the last one's. No later step can be saved in its stead."""
    out = tmp_path / "run"
    config = config_of(start, out, TP1)
    killed_in_closing(config, faults={6: "gradient"})
    assert [path.name for path in checkpoints_in(out / "checkpoints")] == ["step_3", "step_2"]
    before = times(out)
    finish(config)
    assert times(out) == before, "no step was done again"
    assert read_lines(out / "evaluations.jsonl")[-1]["step"] == NUM_STEPS


def test_told_to_stop_between_two_temperatures_the_start_is_scored_anew(
    start: Start,
    undisturbed: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    config = config_of(start, out, TP2)
    told = run_ranks(program, 2, config=config, topology=TP2, step=0, number=signal.SIGTERM)
    assert told == [f"85 rank 1: SIGTERM; stopped with 0 of {NUM_STEPS} steps done"] * 2
    assert "SIGTERM: stopping before the next step, with nothing new" in capfd.readouterr().err
    assert [row["eval/temperature"] for row in read_lines(out / "evaluations.jsonl")] == [1.0]
    assert not (out / "rollouts").exists()
    finish(config, TP2)
    scored = read_lines(out / "evaluations.jsonl")
    for ours, theirs in zip(scored, read_lines(undisturbed / "evaluations.jsonl"), strict=True):
        # In another layout the actor's figures of single tokens are rounded otherwise.
        probed = {name: value for name, value in theirs.items() if "/probe_" in name}
        assert {name: ours[name] for name in probed} == pytest.approx(probed, abs=1e-5)
        assert ours | probed == theirs
    assert [row["eval/temperature"] for row in scored] == [1.0, 0.0, 1.0]


def time_left(_rank: int, config: RunConfig) -> list[str]:
    """Why to stop after each step, where a step takes no time, an evaluation 100 s, and 60 are
    left."""
    context = join_groups(TP1, device=torch.device("cpu"))
    with open_loop(config, context, Console(enabled=False), build_torch_engine) as loop:
        loop.clock.longest["evaluate"] = 100.0
        loop.edge._deadline = Deadline(job_end=None, run_end=time.time() + 60.0)
        return [loop.edge._lacks_time(step) for step in range(1, NUM_STEPS + 1)]


def test_the_closing_evaluation_needs_time(start: Start, tmp_path: Path) -> None:
    [reasons] = run_ranks(time_left, 1, config=config_of(start, tmp_path / "run", TP1))
    assert reasons[:-1] == ["", ""]
    assert reasons[-1].startswith("checkpoint.stop_after in ")

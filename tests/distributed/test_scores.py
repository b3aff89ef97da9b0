"""`osft evaluate` on the checkpoints of a run: what training found, and an interruption of it."""

import json
import os
import shutil
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RanksFailed, run_ranks
from torch_engine import TorchEngine, build_torch_engine
from toy_run import Start, read_lines, toy_config, write_start

from osft_mcore.config.check import check
from osft_mcore.config.schema import Phase, RunConfig, SyncConfig
from osft_mcore.errors import ConfigError, NothingLeft, Stopped
from osft_mcore.log.console import Console
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.records import Prompt, Response, Sampling
from osft_mcore.train.evaluate import run_evaluate
from osft_mcore.train.osft import run_osft
from osft_mcore.train.scored import check_earlier_scores

ALONE = Topology(tp=1, pp=1, dp=1)
TP2 = Topology(tp=2, pp=1, dp=1, rollout_tp=2)
STEPS = (0, 2, 4)
PER_PORTION = 24
"""Answers: of 16 problems with 4 samples each three portions; greedy all in one."""
NUM_CALLS = 10
"""Of the engine: three portions for each of three models, and the greedy one."""


def program(
    rank: int, phase: Phase, config: RunConfig, topology: Topology, call: int, number: int
) -> str:
    """What it ended with, and after how many calls of the engine; `number` is sent in call `call`.

    It runs in a process of its own.
    """
    check(config, world_size=topology.world_size, phase=phase, device="cpu")
    context = join_groups(topology, device=torch.device("cpu"))
    generate, calls = TorchEngine.generate, 0

    def counted(
        engine: TorchEngine, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[Response]:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return generate(engine, prompts, sampling)

    TorchEngine.generate = counted  # type: ignore[method-assign]
    run = {"train": run_osft, "evaluate": run_evaluate}[phase]
    try:
        run(config, context, Console(enabled=rank == 0), build_torch_engine)
    except (Stopped, NothingLeft, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    return f"done after {calls} calls"


def finish(
    config: RunConfig, topology: Topology = ALONE, *, phase: Phase = "evaluate", **ending: Any
) -> str:
    ending = {"call": 0, "number": signal.SIGTERM, **ending}
    told = run_ranks(
        program, topology.world_size, phase=phase, config=config, topology=topology, **ending
    )
    assert told == [told[0]] * topology.world_size
    return str(told[0])


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return write_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def run(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, scored and saved after every second one."""
    out = tmp_path_factory.mktemp("trained") / "run"
    config = toy_config(start, out, ALONE)
    config = replace(
        config,
        train=replace(config.train, steps=4, lr_warmup_steps=0),
        evaluation=replace(config.evaluation, every=2),
        checkpoint=replace(config.checkpoint, every=2, keep_last=9),
    )
    assert finish(config, phase="train").startswith("done")
    return out


def scores_config(
    start: Start, trained: Path, out: Path, topology: Topology = ALONE, **evaluation: Any
) -> RunConfig:
    config = toy_config(start, out, topology)
    options = {"run": str(trained), "every": 0, "portion": PER_PORTION, **evaluation}
    return replace(config, evaluation=replace(config.evaluation, **options))


@pytest.fixture(scope="module")
def undisturbed(start: Start, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored") / "scores"
    assert finish(scores_config(start, run, out)) == f"done after {NUM_CALLS} calls"
    return out


def contents(out: Path) -> dict[str, Any]:
    """Everything that scores leave behind, but for times."""
    summary = json.loads((out / "summary.json").read_text())
    del summary["seconds"]
    files = {path.name: path.read_text() for path in (out / "evaluations").iterdir()}
    return {"summary": summary, "lines": read_lines(out / "evaluations.jsonl"), **files}


def test_a_checkpoint_scores_as_its_training_did(run: Path, undisturbed: Path) -> None:
    names = [f"step_{step}_temperature_1" for step in STEPS] + ["step_0_temperature_0"]
    for name in names:
        ours, theirs = (at / "evaluations" / f"{name}.jsonl" for at in (undisturbed, run))
        assert ours.read_text() == theirs.read_text(), name
        ours, theirs = (at / "evaluations" / f"{name}.json" for at in (undisturbed, run))
        with_probe = json.loads(theirs.read_text())
        assert with_probe["benchmarks"]["arithmetic"].pop("probe"), "the actor's, here is none"
        with_probe["metrics"] = {
            metric: value
            for metric, value in with_probe["metrics"].items()
            if not metric.startswith("eval/arithmetic/probe_")
        }
        assert json.loads(ours.read_text()) == with_probe, name
    files = sorted(path.name for path in (undisturbed / "evaluations").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in names for kind in ("json", "jsonl"))
    by_step = [(row["step"], row["eval/temperature"]) for row in read_lines(
        undisturbed / "evaluations.jsonl")]  # fmt: skip
    assert by_step == [(0, 1.0), (0, 0.0), (2, 1.0), (4, 1.0)]
    trained = {row["eval/pass_at_1"] for row in read_lines(run / "evaluations.jsonl")}
    assert len(trained) > 2, "training changes scores, or this shows nothing"


def test_the_summary_sets_the_last_model_against_the_first(run: Path, undisturbed: Path) -> None:
    theirs, ours = (json.loads((at / "summary.json").read_text()) for at in (run, undisturbed))
    assert ours["pass_at_1"] == theirs["base_pass_at_1"]
    assert ours["best_temperature"] == theirs["base_best_temperature"]
    for name in ("gain", "gain_ci95", "gain_p_value"):
        assert ours[name] == theirs[name], name
    assert list(ours["steps"]) == [str(step) for step in STEPS]
    assert ours["steps"]["4"]["1"]["pass@1"] == theirs["osft_pass_at_1"]


@pytest.mark.parametrize("reload", [False, True])
def test_scores_do_not_depend_on_the_layout(
    start: Start, run: Path, undisturbed: Path, tmp_path: Path, reload: bool
) -> None:
    config = scores_config(start, run, tmp_path / "scores", TP2)
    if reload:
        config = replace(config, sync=SyncConfig(mode="reload"))
    finish(config, TP2)
    ours, theirs = contents(tmp_path / "scores"), contents(undisturbed)
    assert ours == theirs


def test_killed_in_any_portion_it_goes_on_as_if_it_had_not_been(
    start: Start, run: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """In its third call: the first portion is kept then, the second one is being graded."""
    config = scores_config(start, run, tmp_path / "scores")
    num_kept: list[int] = []
    while not (tmp_path / "scores" / "summary.json").is_file():
        assert len(num_kept) < NUM_CALLS, "every start should do some of the work"
        # The last start has no third call.
        with suppress(RanksFailed):
            finish(config, call=3, number=signal.SIGKILL)
        num_kept.append(len(list((tmp_path / "scores" / "evaluations").rglob("*.jsonl"))))
    assert len(num_kept) >= 4
    assert contents(tmp_path / "scores") == contents(undisturbed)


def test_told_to_stop_it_goes_on_after_the_portions_that_are_done(
    start: Start, run: Path, undisturbed: Path, tmp_path: Path
) -> None:
    config = scores_config(start, run, tmp_path / "scores", TP2)
    said = finish(config, TP2, call=6)
    assert said.startswith("Stopped: rank 0: SIGTERM; stopped after portion 5 of 10")
    # In another layout; of the engine's ten calls five are left.
    alone = scores_config(start, run, tmp_path / "scores")
    assert finish(alone) == "done after 5 calls"
    assert contents(tmp_path / "scores") == contents(undisturbed)


def test_more_temperatures_and_steps_go_on(start: Start, run: Path, undisturbed: Path) -> None:
    out = undisturbed.parent / "more"
    shutil.copytree(undisturbed, out)
    config = scores_config(start, run, out)
    said = finish(config)
    assert said.startswith("NothingLeft: the scores are in")
    more = scores_config(start, run, out, sweep="0:1:0.5", steps=(4, 4))
    # 0.5 in three portions, and greedy in one.
    assert finish(more) == "done after 4 calls"
    assert len(read_lines(out / "evaluations.jsonl")) == 6
    ours, theirs = (json.loads((at / "summary.json").read_text()) for at in (out, undisturbed))
    assert list(ours["steps"]["4"]) == ["1", "0", "0.5"]
    # What the first start has found is still there.
    assert [ours["steps"][step] for step in "02"] == [theirs["steps"][step] for step in "02"]
    for name in ("pass_at_1", "best_temperature", "gain", "gain_ci95", "gain_p_value"):
        assert ours[name] == theirs[name], name
    made_of = [
        json.loads((at / "manifest.json").read_text())["identity"] for at in (out, undisturbed)
    ]
    assert made_of[0] == made_of[1]
    for steps in ((), (4,)):
        with pytest.raises(NothingLeft):
            check_earlier_scores(scores_config(start, run, out, steps=steps))


def test_answers_that_the_summary_lacks_are_put_into_it(
    start: Start, run: Path, undisturbed: Path
) -> None:
    """Killed just before, a second start has left the first one's."""
    out = undisturbed.parent / "lacking"
    shutil.copytree(undisturbed, out)
    summary = json.loads((out / "summary.json").read_text())
    del summary["steps"]["4"]
    (out / "summary.json").write_text(json.dumps(summary))
    assert finish(scores_config(start, run, out)) == "done after 0 calls"
    assert contents(out) == contents(undisturbed)


def test_only_models_that_have_the_temperature_are_compared(
    start: Start, run: Path, undisturbed: Path
) -> None:
    out = undisturbed.parent / "elsewhere"
    shutil.copytree(undisturbed, out)
    config = scores_config(start, run, out, steps=(4,), temperature=0.5)
    assert finish(config) == "done after 3 calls"
    ours, theirs = (json.loads((at / "summary.json").read_text()) for at in (out, undisturbed))
    assert ours["steps"]["2"] == theirs["steps"]["2"]
    assert ours["pass_at_1"] == ours["steps"]["4"]["0.5"]["pass@1"]
    assert "gain" not in ours, "no other model has scores at 0.5"


@pytest.mark.parametrize(
    ("evaluation", "match"),
    [
        ({"num_samples": 2}, "evaluation.num_samples: 4 -> 2"),
        ({"portion": 8}, "evaluation.portion: 24 -> 8"),
        ({"steps": (3,)}, "evaluation.steps: 3 not found in .*the weights after 0, 2, 4 steps"),
        ({"run": "nowhere"}, "evaluation.run: 'nowhere' is no run"),
    ],
)
def test_other_scores_are_refused(
    start: Start, run: Path, undisturbed: Path, evaluation: dict[str, Any], match: str
) -> None:
    config = scores_config(start, run, undisturbed, **evaluation)
    with pytest.raises(ConfigError, match=match):
        check_earlier_scores(config)


def test_other_weights_are_refused(
    start: Start, run: Path, undisturbed: Path, tmp_path: Path
) -> None:
    trained, out = tmp_path / "run", tmp_path / "scores"
    shutil.copytree(run, trained)
    config = scores_config(start, trained, out, steps=(2, 4))
    finish(config)
    for name in ("step_2", "step_4"):
        (trained / "checkpoints" / name).rename(trained / "checkpoints" / f"was_{name}")
    (trained / "checkpoints" / "was_step_2").rename(trained / "checkpoints" / "step_4")
    with pytest.raises(ConfigError, match="the weights after step 4 are others than those"):
        check_earlier_scores(replace(config, evaluation=replace(config.evaluation, steps=(4,))))


def test_a_checkpoint_that_is_not_whole_is_named(start: Start, run: Path, tmp_path: Path) -> None:
    trained = tmp_path / "run"
    shutil.copytree(run, trained)
    part = next((trained / "checkpoints" / "step_2").glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1])
    config = scores_config(start, trained, tmp_path / "scores")
    with pytest.raises(ConfigError, match=rf"evaluation.run: .*{part.name}.*\n.*evaluation.steps"):
        check_earlier_scores(config)


def test_the_export_stands_in_where_no_checkpoint_is(
    start: Start, run: Path, undisturbed: Path, tmp_path: Path
) -> None:
    trained = tmp_path / "run"
    shutil.copytree(run, trained)
    shutil.rmtree(trained / "checkpoints")
    finish(scores_config(start, trained, tmp_path / "scores"))
    found = contents(tmp_path / "scores")
    assert list(found["summary"]["steps"]) == ["0", "4"]
    name = "step_4_temperature_1.jsonl"
    assert found[name] == contents(undisturbed)[name]

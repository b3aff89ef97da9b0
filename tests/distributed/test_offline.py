"""Offline OSFT: answers sampled once, converted, and learned by `osft sft`."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RanksFailed, run_ranks
from safetensors.torch import load_file
from torch_engine import build_torch_engine
from toy_run import Start, read_lines, toy_config, write_start

from osft_mcore.config.check import check
from osft_mcore.config.schema import Phase, RunConfig, SyncConfig
from osft_mcore.config.schema_evaluation import EvaluationConfig
from osft_mcore.data.solutions import convert_solutions
from osft_mcore.errors import ConfigError, NothingLeft, Stopped
from osft_mcore.log.console import Console
from osft_mcore.log.run_folder import RunFolder
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.train.generate import Generation, run_generate
from osft_mcore.train.osft import run_osft
from osft_mcore.train.sft import run_sft

ALONE = Topology(tp=1, pp=1, dp=1)
MAX_RESPONSE = 18
"""In tokens: cuts off many of the answers, and not all."""
NUM_PROMPTS, PER_BATCH, NUM_SAMPLES = 16, 6, 2
"""The last batch is smaller."""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return write_start(tmp_path_factory.mktemp("start"))


def config_of(start: Start, out: Path, topology: Topology = ALONE) -> RunConfig:
    """One step of the toy run, at one temperature."""
    config = toy_config(start, out, topology)
    rollout = replace(
        config.rollout, num_samples=NUM_SAMPLES, tau_sample=1.0, max_response_tokens=MAX_RESPONSE
    )
    return replace(
        config,
        rollout=replace(rollout, annealing=replace(rollout.annealing, mode="off")),
        train=replace(
            config.train, steps=1, prompts_per_step=PER_BATCH, prompts_per_update=3,
            micro_batch_size=3, lr_schedule="constant", lr_warmup_steps=0,
        ),
        evaluation=EvaluationConfig(),
    )  # fmt: skip


def run_phase(_rank: int, phase: Phase, config: RunConfig, topology: Topology) -> None:
    check(config, world_size=topology.world_size, phase=phase, device="cpu")
    context = join_groups(topology, device=torch.device("cpu"))
    console = Console(enabled=False)
    if phase == "sft":
        run_sft(config, context, console)
    else:
        run = {"train": run_osft, "generate": run_generate}[phase]
        run(config, context, console, build_torch_engine)


def whole_pass(start: Start, out: Path, topology: Topology = ALONE) -> RunConfig:
    config = config_of(start, out, topology)
    return replace(config, train=replace(config.train, steps=None))


def generated(config: RunConfig, topology: Topology = ALONE) -> Path:
    run_ranks(run_phase, topology.world_size, phase="generate", config=config, topology=topology)
    return Path(config.output_dir) / "solutions.jsonl"


@pytest.fixture(scope="module")
def solutions(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generated(whole_pass(start, tmp_path_factory.mktemp("generated") / "run"))


def test_every_prompt_is_answered(start: Start, solutions: Path) -> None:
    rows = read_lines(solutions)
    assert sorted((row["row"], row["sample"]) for row in rows) == [
        (row, sample) for row in range(NUM_PROMPTS) for sample in range(NUM_SAMPLES)
    ]
    # Both kinds, or the next tests would show less than they say.
    assert {row["truncated"] for row in rows} == {True, False}
    assert not (solutions.parent / "batches").exists()


def test_an_offline_update_is_the_online_update(
    start: Start, solutions: Path, tmp_path: Path
) -> None:
    online = config_of(start, tmp_path / "online")
    run_ranks(run_phase, 1, phase="train", config=online, topology=ALONE)
    sampled = read_lines(tmp_path / "online" / "rollouts" / "step_1.jsonl")
    ours = read_lines(solutions)[: PER_BATCH * NUM_SAMPLES]
    names = ("prompt_id", "sample", "response", "response_token_ids", "truncated")
    assert [[row[n] for n in names] for row in ours] == [[row[n] for n in names] for row in sampled]
    assert any(row["truncated"] for row in ours)

    convert_solutions(solutions, tmp_path / "sft.parquet", truncated="keep")
    # Token ids are not rendered.
    shutil.copytree(start[1], tmp_path / "no_template")
    (tmp_path / "no_template" / "chat_template.jinja").unlink()
    train = online.train
    offline = replace(
        online,
        output_dir=str(tmp_path / "offline"),
        model=replace(online.model, path=str(tmp_path / "no_template")),
        train=replace(
            train,
            prompts_per_step=train.prompts_per_step * NUM_SAMPLES,
            prompts_per_update=train.prompts_per_update * NUM_SAMPLES,
        ),
        data=replace(
            online.data, train=str(tmp_path / "sft.parquet"), shuffle=False,
            prompt_key="prompt_token_ids", response_key="response_token_ids",
        ),
    )  # fmt: skip
    run_ranks(run_phase, 1, phase="sft", config=offline, topology=ALONE)
    metrics = [read_lines(tmp_path / run / "metrics.jsonl")[0] for run in ("online", "offline")]
    for name in ("loss/loss", "loss/nll", "loss/num_tokens", "optim/grad_norm"):
        assert metrics[0][name] == metrics[1][name], name
    theirs, found = (
        load_file(tmp_path / run / "hf" / "model.safetensors") for run in ("online", "offline")
    )
    before = load_file(start[1] / "model.safetensors")
    assert all(torch.equal(theirs[name], found[name]) for name in theirs)
    assert not any(torch.equal(theirs[name], before[name].float()) for name in theirs)


def with_reload(config: RunConfig) -> RunConfig:
    return replace(config, sync=SyncConfig(mode="reload"))


@pytest.mark.parametrize(
    ("topology", "change"),
    [
        (Topology(tp=2, pp=1, dp=1, rollout_tp=2), replace),
        (Topology(tp=1, pp=1, dp=2), with_reload),
    ],
    ids=["tp2", "two replicas, reload"],
)
def test_answers_do_not_depend_on_the_layout(
    topology: Topology,
    change: Callable[[RunConfig], RunConfig],
    start: Start,
    solutions: Path,
    tmp_path: Path,
) -> None:
    config = change(whole_pass(start, tmp_path / "run", topology))
    assert generated(config, topology).read_bytes() == solutions.read_bytes()


def stopped_after_one(rank: int, config: RunConfig, topology: Topology) -> str:
    """Why it stopped; a signal comes to rank 1 while the first batch is sampled."""
    sample = Generation._sample

    def interrupted(self: Generation, number: int) -> Any:
        if rank == topology.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(self, number)

    Generation._sample = interrupted  # type: ignore[method-assign]
    try:
        run_phase(rank, "generate", config, topology)
    except Stopped as error:
        return str(error)
    return ""


def test_a_stopped_pass_goes_on(start: Start, solutions: Path, tmp_path: Path) -> None:
    topology = Topology(tp=2, pp=1, dp=1, rollout_tp=2)
    config = whole_pass(start, tmp_path / "run", topology)
    told = run_ranks(stopped_after_one, topology.world_size, config=config, topology=topology)
    assert told[0] == told[1]
    assert told[0].startswith("rank 1: SIGTERM; stopped after batch 1 of 3")
    first = tmp_path / "run" / "batches" / "batch_1.jsonl"
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    assert not (tmp_path / "run" / "solutions.jsonl").exists()

    other = replace(config, rollout=replace(config.rollout, tau_sample=0.5))
    with pytest.raises(
        AssertionError, match=r"rollout.tau_sample: found 0.5, the run began with 1"
    ):
        generated(other, topology)
    # Only a batch that is not sampled again can show this.
    kept = first.read_text().replace('"data_source":"arithmetic"', '"data_source":"kept"')
    first.write_text(kept)
    now = whole_pass(start, tmp_path / "run", ALONE)
    assert generated(now).read_text() == kept + "".join(
        solutions.read_text().splitlines(keepends=True)[PER_BATCH * NUM_SAMPLES :]
    )
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in metrics] == [1, 2, 3]
    assert {name for record in metrics for name in record if name.startswith("time/")} == {
        "time/rollout_s"
    }


METRICS, BATCH = ("append_line", "metrics.jsonl"), ("write_text", "batches/batch_2.jsonl")
KILLS = {
    "in the metrics line": (METRICS, 2, True),
    "after the metrics line": (METRICS, 2, False),
    "after the batch": (BATCH, 1, False),
    "after the answers": (("join", "solutions.jsonl"), 1, False),
    "after the summary": (("write_text", "summary.json"), 1, False),
}
"""Which call on the run folder is the last, counted from 1, and whether it is cut short."""


def killed(
    _rank: int, config: RunConfig, call: tuple[str, str], last: int, cut_short: bool
) -> None:
    method, name = call
    real: Callable[..., None] = getattr(RunFolder, method)
    seen = 0

    def then_dies(folder: RunFolder, wanted: str, *args: Any) -> None:
        nonlocal seen
        real(folder, wanted, *args)
        seen += wanted == name
        if wanted == name and seen == last:
            if cut_short:
                os.truncate(folder.path / name, (folder.path / name).stat().st_size - 9)
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(RunFolder, method, then_dies)
    run_phase(0, "generate", config, ALONE)


def files_of(run: Path) -> dict[str, Any]:
    """What a pass leaves behind, without times; not the lock, which outlives a killed process."""
    found: dict[str, Any] = {str(path.relative_to(run)): None for path in run.rglob("*")}
    found.pop("run.lock", None)
    found["solutions.jsonl"] = (run / "solutions.jsonl").read_text()
    summary = json.loads((run / "summary.json").read_text())
    metrics = read_lines(run / "metrics.jsonl")
    sampled = sum(row.pop("time/rollout_s") for row in metrics)
    assert summary.pop("seconds")["rollout"] == pytest.approx(sampled, abs=0.006)
    return found | {"summary.json": summary, "metrics.jsonl": metrics}


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_pass_ends_as_the_one_that_was_left_alone(
    moment: str, start: Start, solutions: Path, tmp_path: Path
) -> None:
    config = whole_pass(start, tmp_path / "run")
    call, last, cut_short = KILLS[moment]
    with pytest.raises(RanksFailed):
        run_ranks(killed, 1, config=config, call=call, last=last, cut_short=cut_short)
    [said] = run_ranks(refused, 1, config=config)
    assert said.startswith("NothingLeft: 3 of 3") if moment == "after the summary" else said == ""
    assert files_of(tmp_path / "run") == files_of(solutions.parent)


def refused(_rank: int, config: RunConfig) -> str:
    try:
        run_phase(0, "generate", config, ALONE)
    except (NothingLeft, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_finished_pass_is_not_begun_again(start: Start, solutions: Path) -> None:
    config = whole_pass(start, solutions.parent)
    before = solutions.read_bytes()
    [said] = run_ranks(refused, 1, config=config)
    assert said.startswith("NothingLeft: 3 of 3 batches are done")
    [said] = run_ranks(refused, 1, config=replace(config, seed=2))
    assert "seed: found 2, the run began with 1" in said
    assert solutions.read_bytes() == before

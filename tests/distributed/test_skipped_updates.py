"""Runs in which some updates are not finite: told, kept, left out of the metrics, and not for ever.

Everything is real but the sampler, as in the golden run.
"""

import io
import itertools
import json
import math
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import pytest
import torch
from ranks import run_ranks
from torch_engine import build_torch_engine
from toy_run import Start, read_lines, toy_config, write_start

from osft_mcore.actor.actor import Actor
from osft_mcore.checkpoint.folder import checkpoints_in
from osft_mcore.config.schema import CheckpointConfig, DataConfig, RunConfig
from osft_mcore.config.schema_evaluation import EvaluationConfig
from osft_mcore.errors import AgreementError, NonFiniteError, WeightError
from osft_mcore.log.console import Console
from osft_mcore.log.run_folder import RunFolder
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.train.osft import open_loop, run_osft
from osft_mcore.train.schedules import learning_rate
from osft_mcore.train.sft import run_sft

ONE_RANK = Topology(tp=1, pp=1, dp=1)
TWO_REPLICAS = Topology(tp=1, pp=1, dp=2)
NORM = "decoder.final_layernorm.weight"
Faults = Mapping[int, str]
"""What befalls the last rank, by the number of the update, from 1."""


def config_of(
    start: Start, out: Path, topology: Topology, *, steps: int, limit: int = 3
) -> RunConfig:
    config = toy_config(start, out, topology)
    train = replace(config.train, steps=steps, max_skipped_updates=limit)
    checkpoint = CheckpointConfig(every=1, async_=False, keep_last=1)
    return replace(config, train=train, evaluation=EvaluationConfig(), checkpoint=checkpoint)


def inject(faults: Faults) -> None:
    """Into every actor of this process. `reference`: for good."""
    real, numbers = Actor._forward_backward, itertools.count(1)

    def forward_backward(actor: Actor, *args: Any, **options: Any) -> Any:
        fault = faults.get(next(numbers))
        if actor.context.rank < actor.context.topology.world_size - 1:
            fault = None
        weight = actor.parameters()[NORM]
        before = weight.clone()
        if fault == "weight":
            weight.fill_(math.nan)
        if fault == "reference":
            assert actor.reference is not None
            actor.reference._host[NORM].fill_(math.nan)
        if fault == "moved":
            before = weight.mul_(1.5).clone()
        parts = real(actor, *args, **options)
        weight.copy_(before)
        if fault == "gradient":
            for parameter in actor.chunks[-1].parameters():
                parameter.main_grad.fill_(math.nan)
        return parts

    Actor._forward_backward = forward_backward  # type: ignore[method-assign]


def write_slowly(name: str) -> None:
    """File `name` of the run folder is long in coming."""
    real = RunFolder.write_text

    def write_text(folder: RunFolder, wanted: str, text: str) -> None:
        if wanted == name and folder.writer:
            time.sleep(0.3)
        real(folder, wanted, text)

    RunFolder.write_text = write_text  # type: ignore[method-assign]


def run(rank: int, config: RunConfig, topology: Topology, faults: Faults) -> tuple[str, str]:
    """How a run ended, and what it printed."""
    context = join_groups(topology, device=torch.device("cpu"))
    inject(faults)
    write_slowly("skipped/step_4_update_2.json")
    printed = io.StringIO()
    with redirect_stdout(printed):
        console = Console(enabled=rank == 0)
        try:
            if config.data.train.endswith("sft.parquet"):
                run_sft(config, context, console)
            else:
                run_osft(config, context, console, build_torch_engine)
        except (NonFiniteError, AgreementError) as error:
            # An error of one rank ends them all, so what was promised must be there.
            for file in re.findall(r"batch in (.*)", str(error)):
                assert Path(file).exists(), file
            return f"{type(error).__name__}: {error}", printed.getvalue()
    return "", printed.getvalue()


def strict(text: str) -> Any:
    """JSON without NaN and Infinity, which other readers refuse."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def records(out: Path) -> list[dict[str, float]]:
    return [strict(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def dumps(out: Path) -> dict[str, Any]:
    return {path.name: strict(path.read_text()) for path in (out / "skipped").iterdir()}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return write_start(tmp_path_factory.mktemp("start"))


# Two updates a step: skipped are one of step 1, both of step 2, the last of step 3, both of step 4.
FAULTS = {1: "gradient", 3: "weight", 4: "gradient", 6: "gradient", 7: "weight", 8: "gradient"}
NUM_LOGGED = 3
NAMES = ["step_1_update_1", "step_2_update_1", "step_2_update_2", "step_3_update_2",
         "step_4_update_1", "step_4_update_2"]  # fmt: skip


@pytest.fixture(scope="module")
def stopped(start: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A run of two ranks that its third skipped update in a row stops."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    config = config_of(start, out, TWO_REPLICAS, steps=20)
    return out, run_ranks(run, 2, config=config, topology=TWO_REPLICAS, faults=FAULTS)


def test_too_many_in_a_row_over_steps_stop_all_ranks_alike(stopped: tuple[Path, list[Any]]) -> None:
    out, ((message, printed), (other, nothing)) = stopped
    assert message == other
    assert nothing == "", "one rank tells"
    nan = "loss is nan, gradient norm is nan"
    assert message.splitlines() == [
        "NonFiniteError: step 4: 3 updates in a row were skipped because loss or gradient was not "
        "finite (option train.max_skipped_updates)",
        f"step 3, update 2: gradient norm is nan; batch in {out}/skipped/step_3_update_2.json",
        f"step 4, update 1: {nan}; batch in {out}/skipped/step_4_update_1.json",
        f"step 4, update 2: gradient norm is nan; batch in {out}/skipped/step_4_update_2.json",
        "the weights are those from before these; look at train.lr (found 0.0005), "
        "train.clip_grad (found 1) and model.dtype (found fp32); started again, the run goes on "
        "from its newest checkpoint, which is from before",
    ]
    told = re.findall(r"^skipped (step \d), update (\d): .* \((\d) in a row", printed, re.MULTILINE)
    assert told == [
        ("step 1", "1", "1"), ("step 2", "1", "1"), ("step 2", "2", "2"), ("step 3", "2", "1"),
        ("step 4", "1", "2"), ("step 4", "2", "3"),
    ]  # fmt: skip
    assert "osft 2/20  response_length_mean" in printed
    assert "osft 3/20  nll" in printed


def test_weights_that_may_be_to_blame_do_not_replace_a_checkpoint(
    stopped: tuple[Path, list[Any]],
) -> None:
    """Steps 2 and 3 ended with a skipped update: keep_last=1 would have deleted step 1 for them."""
    out, _ = stopped
    assert [path.name for path in checkpoints_in(out / "checkpoints")] == ["step_1"]


def test_the_batch_of_a_skipped_update_is_kept(stopped: tuple[Path, list[Any]]) -> None:
    out, _ = stopped
    kept = dumps(out)
    assert sorted(kept) == [f"{name}.json" for name in NAMES]
    record = kept["step_2_update_1.json"]
    assert (record["step"], record["update"]) == (2, 1)
    assert record["reason"] == "loss is nan, gradient norm is nan"
    assert record["loss"] == record["grad_norm"] == "nan"
    sampled = read_lines(out / "rollouts" / "step_2.jsonl")
    shared = ("prompt_id", "sample", "replica", "weight_version", "num_tokens", "truncated",
              "response_token_ids")  # fmt: skip
    for update, rows in ((1, sampled[:8]), (2, sampled[8:])):
        batch = kept[f"step_2_update_{update}.json"]["batch"]
        assert [{key: row[key] for key in shared} for row in batch] == [
            {key: row[key] for key in shared} for row in rows
        ]
        assert [row["prompt_id"].split("/")[1] for row in batch] == [str(r["row"]) for r in batch]
    assert {row["replica"] for row in record["batch"]} == {0, 1}
    finite = kept["step_2_update_2.json"]
    assert finite["reason"] == "gradient norm is nan"
    assert 0 < finite["loss"] < 10


def test_metrics_are_of_the_updates_that_were_taken(stopped: tuple[Path, list[Any]]) -> None:
    out, _ = stopped
    logged = records(out)
    counts = [(r["optim/num_updates"], r["optim/num_skipped"]) for r in logged]
    assert counts == [(1, 1), (0, 2), (1, 1)]
    of_updates = {"loss/loss", "loss/nll", "loss/perplexity", "loss/entropy", "loss/num_tokens",
                  "train/padding_share", "optim/grad_norm", "sync/logprob_diff_mean",
                  "sync/logprob_diff_max"}  # fmt: skip
    names = [{name for name in r if not name.startswith("time/")} for r in logged]
    assert names[0] == names[2]
    assert names[0] - names[1] == of_updates
    # The schedule goes by steps, the versions by pushes, whatever was skipped.
    assert [r["sync/weight_version"] for r in logged] == [2, 3, 4]
    train = config_of((out, out), out, TWO_REPLICAS, steps=20).train
    for step, record in enumerate(logged, start=1):
        assert record["optim/lr"] == learning_rate(train, step=step, total_steps=20)


def test_a_run_without_any_update_has_a_summary(start: Start, tmp_path: Path) -> None:
    config = config_of(start, tmp_path, ONE_RANK, steps=1)
    [(error, printed)] = run_ranks(
        run, 1, config=config, topology=ONE_RANK, faults={1: "weight", 2: "gradient"}
    )
    assert error == ""
    summary = strict((tmp_path / "summary.json").read_text())
    assert summary["tau_sample"] == "0.6 to 1, linear, over 15 steps"
    assert summary["num_skipped_updates"] == 2
    assert not [name for name in summary if name.startswith("sync/logprob")]
    assert "rollout vs actor: unknown;" in printed
    assert "2 updates skipped" in printed


def test_the_gate_waits_for_the_first_update_that_moves_weights(
    start: Start, tmp_path: Path
) -> None:
    """The weights change on their own before update 2: unseen, unless the first was skipped."""
    endings = []
    for name, faults in (("b", {1: "weight", 2: "moved"}), ("a", {2: "moved"})):
        config = config_of(start, tmp_path / name, ONE_RANK, steps=1)
        [(error, _)] = run_ranks(run, 1, config=config, topology=ONE_RANK, faults=faults)
        endings.append(error)
    assert endings[0].startswith("AgreementError: step 1: rollout replica 0 and the actor disagree")
    assert endings[1] == ""


BLAMED = "its log-probabilities are to blame, the trained model's are finite"
RANDOM = "the random weights that the run began with"
BOTH = "the trained model's own log-probabilities are not finite either"


@pytest.mark.parametrize(
    ("fault", "source", "told"),
    [
        ("reference", "folder", f"the model in {{folder!r}}; {BLAMED}"),
        ("reference", "", f"the starting model, model.path {{model!r}}, as it is empty; {BLAMED}"),
        ("reference", "random", f"{RANDOM}, as it is empty; {BLAMED}"),
        ("weight", "folder", f"the model in {{folder!r}}; {BOTH}"),
    ],
    ids=["folder", "starting model", "random weights", "the model itself"],
)  # fmt: skip
def test_a_kl_that_is_not_finite_tells_what_it_is_measured_from(
    fault: str, source: str, told: str, start: Start, tmp_path: Path
) -> None:
    config = config_of(start, tmp_path / "run", ONE_RANK, steps=1, limit=2)
    folder = str(shutil.copytree(start[1], tmp_path / "reference"))
    reference = folder if source == "folder" else ""
    init: Literal["pretrained", "random"] = "random" if source == "random" else "pretrained"
    config = replace(
        config,
        algorithm=replace(config.algorithm, kl_coef=0.1, reference=reference),
        model=replace(config.model, init=init),
    )
    faults = {1: fault, 2: fault}
    [(error, _)] = run_ranks(run, 1, config=config, topology=ONE_RANK, faults=faults)
    first, second, third, line, _ = error.splitlines()
    assert first.startswith("NonFiniteError: step 1: 2 updates in a row were skipped")
    assert all("KL to the reference model is nan, loss is nan" in text for text in (second, third))
    told = told.format(folder=folder, model=config.model.path)
    assert line == f"algorithm.reference: the KL is measured from {told}"


def break_a_weight(_rank: int, config: RunConfig) -> tuple[str, str]:
    """The first update leaves a NaN behind on rank 1; what the push says, and then the engine."""
    context = join_groups(TWO_REPLICAS, device=torch.device("cpu"))
    with open_loop(config, context, Console(enabled=False), build_torch_engine) as loop:
        loop.sync.push()
        if context.rank == 1:
            loop.actor.parameters()[NORM][3] = math.nan
        with pytest.raises(WeightError) as pushed:
            loop.sync.push()
        with pytest.raises(WeightError) as refused:
            loop.engine.generate(loop.batch(1), loop.sampling(1, 0.6))
    return str(pushed.value), str(refused.value)


def test_nobody_samples_from_weights_that_are_not_finite(start: Start, tmp_path: Path) -> None:
    config = config_of(start, tmp_path / "run", TWO_REPLICAS, steps=1)
    for pushed, refused in run_ranks(break_a_weight, 2, config=config):
        assert re.fullmatch(
            rf"rank 1: 1 of the actor's \d+ parameters hold NaN or infinity: '{NORM}'", pushed
        )
        assert refused == (
            f"rollout: weight version 2 was not delivered: {pushed}; a push must succeed first"
        )


def sft_config(start: Start, out: Path, *, steps: int, limit: int) -> RunConfig:
    config = config_of(start, out, ONE_RANK, steps=steps, limit=limit)
    file = str(start[0] / "sft.parquet")
    data = DataConfig(train=file, shuffle=False)
    rollout = replace(config.rollout, max_response_tokens=24)
    return replace(config, data=data, rollout=rollout)


def test_sft_keeps_the_rows_and_stops(start: Start, tmp_path: Path) -> None:
    config = sft_config(start, tmp_path, steps=3, limit=2)
    faults = {1: "gradient", 3: "weight", 4: "gradient"}
    [(error, printed)] = run_ranks(run, 1, config=config, topology=ONE_RANK, faults=faults)
    assert error.startswith("NonFiniteError: step 2: 2 updates in a row were skipped")
    kept = dumps(tmp_path)
    assert {name: [row["row"] for row in record["batch"]] for name, record in kept.items()} == {
        "step_1_update_1.json": [0, 1, 2, 3],
        "step_2_update_1.json": [8, 9, 10, 11],
        "step_2_update_2.json": [12, 13, 14, 15],
    }
    assert printed.count("skipped step") == 3


def test_sft_ends_with_the_last_known_figures(start: Start, tmp_path: Path) -> None:
    config = sft_config(start, tmp_path, steps=2, limit=3)
    faults = {3: "gradient", 4: "gradient"}
    [(error, printed)] = run_ranks(run, 1, config=config, topology=ONE_RANK, faults=faults)
    assert error == ""
    first, second = records(tmp_path)
    assert "loss/nll" not in second
    assert strict((tmp_path / "summary.json").read_text())["nll"] == first["loss/nll"]
    assert "sft 2/2  lr" in printed

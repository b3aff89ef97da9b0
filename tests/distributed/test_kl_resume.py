"""A run with a KL penalty that goes on: the reference is the same, and another one is refused."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_resume import TP1, TP2, dies, finish, resume_config
from toy_run import Start, read_lines, write_start

from osft_mcore.config.schema import RunConfig
from osft_mcore.config.schema_evaluation import EvaluationConfig
from osft_mcore.errors import ConfigError
from osft_mcore.parallel.topology import Topology
from osft_mcore.train.resume import ResumePoint, candidates, resume_point

NUM_STEPS, DIES_AT = 3, 3


def kl_config(start: Start, out: Path, topology: Topology, **algorithm: Any) -> RunConfig:
    config = resume_config(start, out, topology)
    return replace(
        config,
        train=replace(config.train, steps=NUM_STEPS, epochs=1, lr_warmup_steps=0),
        algorithm=replace(config.algorithm, **{"kl_coef": 0.5, **algorithm}),
        evaluation=EvaluationConfig(),
    )


def figures(run: Path) -> list[dict[str, Any]]:
    """Every logged figure but times and rates."""
    rows = read_lines(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return write_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def undisturbed(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(kl_config(start, out, TP1), TP1)
    return out


@pytest.fixture(scope="module")
def stopped_early(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed in its third step; copied before it goes on."""
    out = tmp_path_factory.mktemp("early") / "run"
    dies(kl_config(start, out, TP1), TP1, DIES_AT)
    return out


def test_the_reference_is_the_starting_model_all_along(
    start: Start, undisturbed: Path, stopped_early: Path, tmp_path: Path
) -> None:
    """Bit by bit."""
    out = tmp_path / "run"
    shutil.copytree(stopped_early, out)
    finish(kl_config(start, out, TP1), TP1)
    assert figures(out) == figures(undisturbed)
    assert all(row["loss/kl"] > 1e-4 for row in figures(out))
    ours, theirs = (load_file(run / "hf" / "model.safetensors") for run in (out, undisturbed))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_the_layout_may_change_on_the_way(
    start: Start, undisturbed: Path, stopped_early: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped_early, out)
    finish(kl_config(start, out, TP2), TP2)
    ours, theirs = (figures(run)[-1] for run in (out, undisturbed))
    for name in ("loss/loss", "loss/nll", "loss/kl"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name


def other_weights(model: Path, folder: Path) -> str:
    """The same shape, one row of one matrix changed as training would change all."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"][0] += 1e-4
    save_file(tensors, file, metadata={"format": "pt"})
    return str(folder)


def point_of(config: RunConfig) -> ResumePoint:
    point = resume_point(config, "train", lambda _folder: [], candidates(config))
    assert point is not None
    return point


@pytest.mark.parametrize("option", ["algorithm.reference", "model.path"])
def test_another_reference_is_refused(
    start: Start, stopped_early: Path, tmp_path: Path, option: str
) -> None:
    """Also where no option has changed, but what lies in the folder of the starting model."""
    other = other_weights(start[1], tmp_path / "other")
    config = kl_config(start, stopped_early, TP1)
    if option == "model.path":
        config = replace(config, model=replace(config.model, path=other))
    else:
        config = replace(config, algorithm=replace(config.algorithm, reference=other))
    with pytest.raises(ConfigError) as caught:
        point_of(config)
    problem, advice = caught.value.problems
    assert problem.startswith("algorithm.reference: ")
    assert "the checkpoint was made with" in problem
    assert "cannot go on from" in advice
    # Without a penalty the weights that a run has started from are of no account.
    point_of(replace(config, algorithm=replace(config.algorithm, kl_coef=0.0, reference="")))


CHANGES: dict[str, tuple[Callable[[RunConfig], RunConfig], str]] = {
    "coefficient": (
        lambda c: replace(c, algorithm=replace(c.algorithm, kl_coef=0.1)),
        "algorithm.kl_coef: 0.5 -> 0.1",
    ),
    "kind": (
        lambda c: replace(c, algorithm=replace(c.algorithm, kl_kind="k2")),
        "algorithm.kl_kind: 'k3' -> 'k2'",
    ),
    "off": (
        lambda c: replace(c, algorithm=replace(c.algorithm, kl_coef=0.0)),
        "algorithm.kl_coef: 0.5 -> 0.0",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_may_change_is_told(start: Start, stopped_early: Path, name: str) -> None:
    change, told = CHANGES[name]
    assert told in point_of(change(kl_config(start, stopped_early, TP1))).changed


def test_the_same_reference_may_lie_elsewhere(
    start: Start, stopped_early: Path, tmp_path: Path
) -> None:
    shutil.copytree(start[1], tmp_path / "moved")
    moved = kl_config(start, stopped_early, TP1, reference=str(tmp_path / "moved"))
    [change] = [line for line in point_of(moved).changed if "reference" in line]
    assert change.startswith("algorithm.reference: '' -> ")


def test_random_weights_are_not_those_of_a_file(start: Start, stopped_early: Path) -> None:
    config = kl_config(start, stopped_early, TP1)
    with pytest.raises(ConfigError, match=r"algorithm\.reference is 'random weights of seed 1'"):
        point_of(replace(config, model=replace(config.model, init="random")))

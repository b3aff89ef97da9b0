"""README.md of an exported model: all that the run folder knows, and no more."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from osft_mcore.checkpoint.model_card import hub_id, model_card, read_provenance

BASE = "/models/models--Qwen--Qwen2.5-Math-7B/snapshots/0123"
CONFIG = f"""\
seed: 3
model:
  path: {BASE}
  dtype: bf16
rollout:
  tau_sample: 0.6
algorithm:
  tau_train: 1.0
train:
  lr: 1.0e-07
"""
EVALUATIONS = (
    {"step": 0, "eval/temperature": 1.0, "eval/math/pass@1": 0.25, "eval/math/pass@2": 0.5},
    {"step": 0, "eval/temperature": 0.3, "eval/math/pass@1": 0.375},
    {"step": 4, "eval/temperature": 1.0, "eval/math/pass@1": 0.625, "eval/math/pass@2": 0.75},
    {"step": 8, "eval/temperature": 1.0, "eval/math/pass@1": 0.875, "eval/math/pass@2": 1.0},
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    manifest = {
        "phase": "train",
        "git_commit": "0a1b2c3d4e5f",
        "data_sha256": {"train|a.parquet": "feed"},
        "packages": {"torch": "2.13.0"},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    summary = {"steps": 8, "gain": 0.625, "gain_ci95": [0.5, 0.75]}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    write_lines(tmp_path / "evaluations.jsonl", EVALUATIONS)
    write_lines(tmp_path / "metrics.jsonl", [{"step": s, "loss/nll": s / 10} for s in (1, 4, 8)])
    return tmp_path


def write_lines(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(card: str, heading: str) -> dict[str, list[str]]:
    """The rows under a heading by their first cells."""
    section = card.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("| ") for line in section.splitlines() if line.startswith("|")]
    cells = [line.replace("\\|", "!").split(" | ") for line in lines]
    return {" ".join(row[:2] if heading == "Evaluation" else row[:1]): row[1:] for row in cells}


def test_the_card_tells_where_the_model_comes_from(run: Path) -> None:
    card = model_card(read_provenance(run, step=8), name="my-model")
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen2.5-Math-7B",
        "tags": ["osft-mcore", "megatron-core", "online-sft"],
    }
    assert "# my-model\n" in text
    assert "its own answers" in text.replace("\n", " ")
    rows = table(text, "Provenance")
    assert rows["base model"] == [f"`{BASE}`"]
    assert rows["step"] == ["8 of 8"]
    sha256 = hashlib.sha256(CONFIG.encode()).hexdigest()
    assert rows["SHA-256 of config.yaml"] == [f"`{sha256}`"]
    assert rows["SHA-256 of `train!a.parquet`"] == ["`feed`"]
    assert rows["source commit"] == ["`0a1b2c3d4e5f`"]
    assert rows["sampling temperature"] == ["0.6"]
    assert rows["prompts per update"] == ["not recorded"]
    assert rows["negative log-likelihood of the last batch"] == ["0.8"]
    assert rows["packages"] == ["torch 2.13.0"]
    assert not {"options", "resharded from"} & rows.keys()
    assert "licence of the base model" in text


def test_scores_are_those_of_the_step_and_of_the_start(run: Path) -> None:
    scores = table(model_card(read_provenance(run, step=8), name="x"), "Evaluation")
    assert scores["step temperature"] == ["temperature", "math/pass@1", "math/pass@2"]
    assert scores["0 (base model) 1"] == ["1", "25.0%", "50.0%"]
    assert scores["0 (base model) 0.3"] == ["0.3", "37.5%", "not evaluated"]
    assert scores["8 1"] == ["1", "87.5%", "100.0%"]
    assert not any(row.startswith("4") for row in scores)
    last, middle = (model_card(read_provenance(run, step=s), name="x") for s in (8, 4))
    assert "+62.5 points, 95% interval +50.0 to +75.0" in last
    assert "points" not in middle, "the interval is of the last step"
    assert "62.5%" in middle
    assert "| step | 4 of 8 |" in middle
    other = model_card(read_provenance(run, step=5), name="x")
    assert "The model after step 5 was not evaluated." in other
    assert "62.5%" not in other


def test_what_is_absent_or_damaged_is_said_to_be(run: Path) -> None:
    (run / "config.yaml").write_text("{[")
    (run / "manifest.json").write_text('{"git')
    (run / "summary.json").unlink()
    (run / "evaluations.jsonl").write_text(json.dumps(EVALUATIONS[2]) + '\n{"step": 4, "ev')
    card = model_card(read_provenance(run, step=4), name="x")
    assert "base_model" not in card
    rows = table(card, "Provenance")
    assert rows["base model"] == rows["SHA-256 of the data"] == rows["seed"] == ["not recorded"]
    assert rows["step"] == ["4"]
    assert "62.5%" in card
    nothing = model_card(read_provenance(None, step=4), name="x")
    assert "The model after step 4 was not evaluated." in nothing
    assert "Trained with osft-mcore.\n" in nothing
    assert "online" not in nothing
    assert "%" not in nothing


@pytest.mark.parametrize(
    ("annealing", "words"),
    [
        ("{mode: linear, end_tau: 1.0, epochs: 2, steps: 15}", "0.6 to 1, linear, over 15 steps"),
        (
            "{mode: cosine, end_tau: 1.5, epochs: 1, steps: null}",
            "0.6 to 1.5, cosine, over 1 epoch",
        ),
        ("{mode: linear, end_tau: 1.0}", "0.6 to 1, linear"),
        ("{mode: 'off', end_tau: 1.0, epochs: 2, steps: null}", "0.6"),
        ("{mode: linear, end_tau: hot}", "0.6"),
        ("linear", "0.6"),
    ],
)
def test_an_annealed_temperature_has_an_end(run: Path, annealing: str, words: str) -> None:
    config = CONFIG.replace("  tau_sample: 0.6\n", f"  tau_sample: 0.6\n  annealing: {annealing}\n")
    (run / "config.yaml").write_text(config)
    rows = table(model_card(read_provenance(run, step=8), name="x"), "Provenance")
    assert rows["sampling temperature"] == [words]


def test_supervised_runs_are_told_apart(run: Path) -> None:
    (run / "manifest.json").write_text(json.dumps({"phase": "sft"}))
    card = model_card(read_provenance(run, step=8), name="x")
    assert "supervised fine-tuning on given answers" in card
    assert "its own answers" not in card
    assert "online" not in card
    rows = table(card, "Provenance")
    assert rows["training temperature"] == ["1.0"]
    assert "sampling temperature" not in rows, "nothing is sampled"


def test_random_weights_have_no_base_model(run: Path) -> None:
    config = CONFIG.replace("  dtype:", "  init: random\n  dtype:")
    (run / "config.yaml").write_text(config)
    card = model_card(read_provenance(run, step=8), name="x")
    rows = table(card, "Provenance")
    assert rows["base model"] == [f"random weights, configuration of `{BASE}`"]
    assert "base_model" not in yaml.safe_load(card.split("---\n", 2)[1])
    assert table(card, "Evaluation")["0 (random weights) 1"] == ["1", "25.0%", "50.0%"]
    assert "Gain in pass@1 over the random weights" in card
    assert "base model" not in card.replace("| base model |", "")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    options = {"seed": 7, "model": {"path": BASE, "init": "pretrained"}, "data": {"train": "a|b"}}
    identity = {"model": {}, "data.train": "cafe"}
    state = {"step": 4, "phase": "sft", "options": options, "identity": identity}
    (folder / "state.json").write_text(json.dumps(state))
    manifest = {"step": 4, "resharded_from": "/runs/x/checkpoints/step_4", "files": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_without_its_run_a_checkpoint_speaks_for_itself(checkpoint: Path) -> None:
    card = model_card(read_provenance(None, step=4, checkpoint=checkpoint), name="x")
    assert "base_model: Qwen/Qwen2.5-Math-7B\n" in card
    assert "supervised fine-tuning on given answers" in card
    rows = table(card, "Provenance")
    assert rows["resharded from"] == ["`/runs/x/checkpoints/step_4`"]
    assert rows["options"] == ["from the checkpoint's state.json"]
    assert rows["seed"] == ["7"]
    assert rows["base model"] == [f"`{BASE}`"]
    assert rows["SHA-256 of `a!b`"] == ["`cafe`"]
    for unknown in ("SHA-256 of config.yaml", "learning rate", "packages"):
        assert rows[unknown] == ["not recorded"]


def provenance_of(run: Path, checkpoint: Path, **options: Any) -> dict[str, list[str]]:
    """The card's rows, of a checkpoint whose state says `options` beside those of the run."""
    state = json.loads((checkpoint / "state.json").read_text())
    state["options"] = {**yaml.safe_load(CONFIG), **options}
    (checkpoint / "state.json").write_text(json.dumps(state))
    card = model_card(read_provenance(run, step=4, checkpoint=checkpoint), name="x")
    return table(card, "Provenance")


def test_a_checkpoint_knows_its_own_options(run: Path, checkpoint: Path) -> None:
    """config.yaml is that of the run's latest start, which may have changed some."""
    rows = provenance_of(run, checkpoint)
    assert "options" not in rows
    assert (rows["seed"], rows["learning rate"]) == (["3"], ["1e-07"])
    rows = provenance_of(run, checkpoint, train={"lr": 5e-4})
    assert rows["options"] == ["from the checkpoint's state.json"]
    assert rows["learning rate"] == ["0.0005"]
    assert rows["SHA-256 of `train!a.parquet`"] == ["`feed`"]
    (run / "config.yaml").write_text("{[")
    assert provenance_of(run, checkpoint)["options"] == ["from the checkpoint's state.json"]


def test_another_run_is_not_asked(run: Path, checkpoint: Path) -> None:
    """A checkpoint that was copied under it says so by its seed, model or data."""
    rows = provenance_of(run, checkpoint, seed=7)
    assert rows["seed"] == ["7"]
    assert rows["packages"] == rows["SHA-256 of config.yaml"] == ["not recorded"]
    assert "SHA-256 of `train!a.parquet`" not in rows


@pytest.mark.parametrize("config", ["a: 2020-13-45", "[" * 3000])
def test_what_is_damaged_is_left_out(run: Path, config: str) -> None:
    (run / "config.yaml").write_text(config)
    write_lines(run / "metrics.jsonl", [{"step": 8, "loss/nll": None}])
    broken = {"step": 8, "eval/temperature": "x", "eval/math/pass@1": None}
    write_lines(run / "evaluations.jsonl", [broken])
    (run / "summary.json").write_text(json.dumps({"steps": 8, "gain": "x", "gain_ci95": [0, 1]}))
    (run / "manifest.json").write_text(json.dumps({"git_commit": "\ud800"}))
    card = model_card(read_provenance(run, step=8), name="x")
    card.encode()
    assert table(card, "Evaluation")["8 not recorded"] == ["not recorded", "not evaluated"]
    assert table(card, "Provenance")["seed"] == ["not recorded"]


@pytest.mark.parametrize("state", [b"", b"[]", b'{"step": 4, "options": 1, "identity": []}'])
def test_a_state_that_says_nothing_is_left_out(checkpoint: Path, state: bytes) -> None:
    (checkpoint / "state.json").write_bytes(state)
    card = model_card(read_provenance(None, step=4, checkpoint=checkpoint), name="x")
    rows = table(card, "Provenance")
    assert rows["seed"] == rows["base model"] == rows["SHA-256 of the data"] == ["not recorded"]
    assert "options" not in rows


def test_only_a_hub_cache_names_a_model_of_the_hub() -> None:
    assert hub_id(BASE) == "Qwen/Qwen2.5-Math-7B"
    assert hub_id("/models/Qwen/Qwen2.5-Math-7B") == ""
    assert hub_id("runs/sft/hf") == ""


def test_entropy_minimisation_is_named(run: Path) -> None:
    entropy = "algorithm:\n  objective: entropy\n  follow_tau_sample: true"
    (run / "config.yaml").write_text(CONFIG.replace("algorithm:", entropy))
    card = model_card(read_provenance(run, step=8), name="x")
    assert "minimising its entropy" in card
    assert "low temperature" not in card
    rows = table(card, "Provenance")
    assert rows["training temperature"] == ["the sampling temperature of each step"]


@pytest.mark.parametrize(
    ("reference", "named"),
    [("", "the model that the run started from"), ("/models/base", "`/models/base`")],
)
def test_a_kl_penalty_is_told(run: Path, reference: str, named: str) -> None:
    assert "KL penalty" not in table(
        model_card(read_provenance(run, step=8), name="x"), "Provenance"
    )
    options = f"algorithm:\n  kl_coef: 0.01\n  kl_kind: k2\n  reference: '{reference}'"
    (run / "config.yaml").write_text(CONFIG.replace("algorithm:", options))
    rows = table(model_card(read_provenance(run, step=8), name="x"), "Provenance")
    assert rows["KL penalty"] == [f"0.01 times k2, reference: {named}"]

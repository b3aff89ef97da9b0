"""What the command line says without starting a run."""

import shutil
from pathlib import Path

import pytest
from program import as_rank, forked, outcome, started
from toy_run import MODEL, START, TASK

from osft_mcore import __version__
from osft_mcore.config.dimensions import known_shape
from osft_mcore.config.load import default_config_dir, load_config
from osft_mcore.data.arithmetic import write_arithmetic

PRESETS = ("arithmetic_osft", "osft_qwen2.5_math_7b")
"""All of them: tests/unit/test_presets.py."""


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("phase", ["train", "sft"])
def test_a_dry_run_of_a_preset_needs_no_model_and_no_data(
    preset: str, phase: str, tmp_path: Path
) -> None:
    overrides = [f"experiment={preset}"]
    if phase == "sft":
        overrides += ["evaluation.files=[]", "evaluation.every=0"]
    result = forked([phase, "--dry-run", *overrides], tmp_path)
    assert (result.code, result.err) == (0, "")
    assert list(tmp_path.iterdir()) == []
    config = load_config(overrides)
    parallel, train = config.parallel, config.train
    world = parallel.world_size
    sections = dict(part.split("\n", 1) for part in result.out.split("\n# ")[1:])
    known = known_shape(config.model.path, None) is not None
    assert ("Weights to vLLM" in sections) == (known and phase == "train")
    assert len(sections["Ranks"].strip().splitlines()) == 1 + world
    answers = config.rollout.num_samples if phase == "train" else 1
    sequences = train.prompts_per_update * answers
    figures = {line.split("  ")[0]: line for line in sections["Batches"].splitlines()}
    assert f" {sequences} " in figures["sequences an update"]
    assert (
        f" {sequences // parallel.dp} = {sequences} / {parallel.dp} "
        in (figures["sequences a data-parallel rank"])
    )
    absent = sections["Not here, so not checked"]
    for file in (config.model.path, config.data.train, *config.evaluation.files):
        assert f"'{file}'" in absent


@pytest.mark.parametrize(
    ("phase", "line"),
    [
        ("generate", "answers a batch  512 = 512 * 1  train.prompts_per_step"),
        ("evaluate", "temperatures       4"),
    ],
)
def test_a_dry_run_that_samples_only(phase: str, line: str, tmp_path: Path) -> None:
    result = forked([phase, "--dry-run", "experiment=arithmetic_osft"], tmp_path)
    assert (result.code, result.err) == (0, "")
    assert line in result.out
    assert ("data.train" in result.out.split("# Not here")[1]) == (phase == "generate")
    assert ("evaluation.files" in result.out.split("# Not here")[1]) == (phase == "evaluate")


def test_options_may_stand_before_and_after_flags(tmp_path: Path) -> None:
    preset, conf = f"experiment={PRESETS[0]}", f"--config-dir={default_config_dir()}"
    options = ["train.lr=-1", "train.steps=-2", "train.lr=-3"]
    results = [
        forked(["train", *arguments], tmp_path)
        for arguments in (
            ["--dry-run", conf, preset, *options],
            [preset, options[0], "--dry-run", options[1], conf, options[2]],
        )
    ]
    assert [result.code for result in results] == [2, 2]
    assert results[0].err == results[1].err
    for problem in ("train.lr: found -3", "train.steps: found -2"):
        assert problem in results[0].err


def test_a_dry_run_still_refuses_what_cannot_work(tmp_path: Path) -> None:
    result = forked(
        ["train", "--dry-run", f"experiment={PRESETS[0]}", "rollout.tp=3", "train.lr=-1"], tmp_path
    )
    assert (result.code, result.out) == (2, "")
    assert "rollout.tp: 3 does not divide" in result.err
    assert "train.lr: found -1" in result.err


def test_an_unknown_option_hides_no_impossible_combination(tmp_path: Path) -> None:
    preset = f"experiment={PRESETS[0]}"
    result = forked(
        ["train", "--dry-run", preset, "train.lrr=1", "model.dtype=fp17", "rollout.tp=3"], tmp_path
    )
    assert (result.code, result.out) == (2, "")
    lines = result.err.splitlines()[1:]
    assert len(lines) == 3
    assert any("train.lrr: unknown option; did you mean train.lr?" in line for line in lines)
    assert any("model.dtype: found 'fp17'" in line for line in lines)
    assert lines[2].startswith("  - without the above: rollout.tp: 3 does not divide the world")


def test_version_and_help_as_a_process(tmp_path: Path) -> None:
    runs = [started(arguments, tmp_path) for arguments in (["--version"], ["train", "--help"])]
    version, usage = (outcome(run) for run in runs)
    assert (version.code, version.out) == (0, f"osft-mcore {__version__}\n")
    assert usage.code == 0
    for word in ("--dry-run", "--config-dir", "option=value"):
        assert word in usage.out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian"],
        ["train", "--drty-run"],
        ["train", "--dry-run", "seed=1", "--drty-run", "seed=2"],
    ],
)
def test_a_command_that_does_not_exist_is_a_usage_error(
    arguments: list[str], tmp_path: Path
) -> None:
    result = forked(arguments, tmp_path)
    assert (result.code, result.out) == (2, "")
    assert "usage: osft" in result.err


def test_the_harness_is_not_told_to_run_foreign_code(tmp_path: Path) -> None:
    given = ["evaluate", "--lm-eval", "gsm8k", "--lm-eval-args=--trust_remote_code"]
    result = forked([*given, "--dry-run", f"experiment={PRESETS[0]}"], tmp_path)
    assert (result.code, result.out) == (2, "")
    assert "--lm-eval-args: '--trust_remote_code' is not passed on; known: " in result.err


@pytest.mark.parametrize(
    ("given", "launcher", "line"),
    [
        (["--lm-eval-args", "--limit 3"], None, "--lm-eval-args: they are for --lm-eval, which"),
        (["--lm-eval", "gsm8k"], as_rank(0, 1), "--lm-eval: the harness runs when the ranks have"),
        (["--lm-eval", "my.yaml"], None, "--lm-eval: 'my.yaml' is not a file"),
    ],
)
def test_a_harness_that_cannot_run_is_refused_before_anything_is_built(
    given: list[str], launcher: dict[str, str] | None, line: str, tmp_path: Path
) -> None:
    files = write_arithmetic(tmp_path / "data", TASK, MODEL)
    shutil.copyfile(START, files.model / "model.safetensors")
    options = [
        f"model.path={files.model}", f"evaluation.files=[{files.eval}]", "output_dir=scores",
        "rollout.max_prompt_tokens=16", "rollout.max_response_tokens=20", "model.dtype=fp32",
    ]  # fmt: skip
    result = forked(["evaluate", *given, *options], tmp_path, launcher)
    assert result.code == 2, result
    assert line in result.err
    assert not (tmp_path / "scores").exists()

"""The presets of conf/experiment: short, planned without weights, with the right dimensions."""

import json
import operator
import re
from pathlib import Path

import pytest

from osft_mcore.cli import main
from osft_mcore.config.dimensions import dimensions_file, known_shape
from osft_mcore.config.load import default_config_dir, load_config
from osft_mcore.errors import ConfigError

CONF = default_config_dir()
PRESETS = sorted((CONF / "experiment").glob("*.yaml"))
SFT = ("offline_qwen2.5_math_7b", "arithmetic_sft", "arithmetic_offline")
NUM_PARAMETERS = {
    # As the model cards and their weight indices have them.
    "Llama-3.1-8B-Instruct": 8_030_261_248,
    "Meta-Llama-3-70B-Instruct": 70_553_706_496,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen2.5-Math-1.5B": 1_543_714_304,
    "Qwen2.5-Math-7B": 7_615_616_512,
    "deepseek-math-7b-instruct": 6_910_365_696,
}


@pytest.mark.parametrize("preset", [path.stem for path in PRESETS])
def test_every_preset_is_planned_without_gpu_weights_or_data(
    preset: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    phase = "sft" if preset in SFT else "train"
    assert main([phase, "--dry-run", f"experiment={preset}"]) == 0
    plan = capsys.readouterr().out
    assert "# Ranks" in plan
    assert "# Batches" in plan
    if not preset.startswith("arithmetic"):
        assert "the model's dimensions are those of" in plan
        assert ("# Weights to vLLM" in plan) == (phase == "train")


SEPT = {
    # sept_1e7_dsr.sh, and what it leaves to the defaults of its framework (whose top_k -1 is our 0)
    "algorithm.objective": "cross_entropy", "algorithm.follow_tau_sample": False,
    "algorithm.tau_train": 1.0, "algorithm.kl_coef": 0.0, "rollout.tau_sample": 0.6,
    "rollout.annealing.mode": "linear", "rollout.annealing.end_tau": 1.0,
    "rollout.annealing.epochs": 2, "rollout.num_samples": 1, "rollout.top_p": 1.0,
    "rollout.top_k": 0, "rollout.max_prompt_tokens": 1024, "rollout.max_response_tokens": 3072,
    "train.epochs": 3, "train.prompts_per_step": 128, "train.prompts_per_update": 64,
    "train.micro_batch_size": 4, "train.lr": 1e-7, "train.lr_schedule": "constant",
    "train.lr_warmup_steps": 10, "train.weight_decay": 0.01, "train.beta1": 0.9,
    "train.beta2": 0.999, "train.eps": 1e-8, "train.clip_grad": 1.0,
    "evaluation.files": ("math500", "amc23", "aime", "aime25", "olympiadbench", "minerva"),
    "evaluation.every": 50, "evaluation.num_samples": 32, "evaluation.temperature": 1.0,
    "checkpoint.every": 300,
}  # fmt: skip
GENERAL = SEPT | {"rollout.tau_sample": 0.9}
PAPER: dict[str, dict[str, object]] = {
    "sept_qwen2.5_math_7b": SEPT,
    "sept_deepseek_math_7b_instruct": SEPT,
    "sept_qwen2.5_7b": GENERAL,
    "sept_qwen2.5_7b_instruct": GENERAL,
    "sept_llama3.1_8b_instruct": GENERAL,
    "sept_llama3_70b_instruct": GENERAL | {"train.micro_batch_size": 1},
    "coupled_qwen2.5_math_7b": SEPT | {"algorithm.follow_tau_sample": True},
    "em_ft_qwen2.5_math_7b": SEPT
    | {
        "algorithm.objective": "entropy", "algorithm.follow_tau_sample": True,
        "algorithm.entropy_coef": 1.0, "rollout.tau_sample": 1.0, "rollout.annealing.mode": "off",
        "checkpoint.every": 50,
    },
    "osft_qwen2.5_math_7b": SEPT
    | {
        "rollout.annealing.mode": "off", "train.epochs": 1,
        "evaluation.files": ("math500", "amc", "aime", "aime25", "olympiadbench", "minerva"),
        "evaluation.every": 10, "evaluation.num_samples": 8, "checkpoint.every": 100,
    },
    "offline_qwen2.5_math_7b": {
        "train.epochs": 3, "train.prompts_per_step": 128, "train.prompts_per_update": 128,
        "train.micro_batch_size": 4, "train.lr": 1e-5, "train.lr_schedule": "cosine",
        "train.lr_warmup_steps": 9, "train.weight_decay": 0.01, "train.beta1": 0.9,
        "train.beta2": 0.95, "train.eps": 1e-8, "train.clip_grad": 1.0, "checkpoint.every": 50,
    },
}  # fmt: skip
"""By preset: what its script or the paper says, read there and not from our files."""


@pytest.mark.parametrize("preset", PAPER)
def test_the_numbers_are_those_of_the_paper(preset: str) -> None:
    config = load_config([f"experiment={preset}"])
    found = {name: operator.attrgetter(name)(config) for name in PAPER[preset]}
    assert found == PAPER[preset]


@pytest.mark.parametrize(
    ("preset", "layout"),
    [
        ("osft_qwen2.5_math_1.5b", "1x1"),
        ("sept_qwen2.5_math_7b", "1x8"),
        ("sept_llama3.1_8b_instruct", "2x8"),
        ("sept_llama3_70b_instruct", "8x8"),
    ],
)
def test_layouts_are_chosen_on_the_command_line(preset: str, layout: str) -> None:
    config = load_config([f"experiment={preset}", f"parallel={layout}"])
    hosts, gpus = map(int, layout.split("x"))
    assert config.parallel.world_size == hosts * gpus
    assert config.parallel.tp <= gpus
    assert gpus % config.rollout.tp == 0


def test_a_plan_without_weights_still_finds_what_cannot_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--dry-run", "experiment=sept_qwen2.5_math_7b", "parallel=8x8"]) != 0
    told = capsys.readouterr().err
    for option in ("parallel.tp", "rollout.tp"):
        assert f"{option}: 8 does not divide the model's 28 attention heads" in told


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_fits_on_a_screen(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 25


def test_dimensions_are_those_of_the_published_models() -> None:
    files = sorted((CONF / "model" / "dimensions").glob("*.json"))
    found = {file.stem: known_shape(f"/anywhere/{file.stem}") for file in files}
    assert {name: shape and shape.num_parameters for name, shape in found.items()} == NUM_PARAMETERS


def test_every_model_choice_has_dimensions() -> None:
    for path in (CONF / "model").glob("*.yaml"):
        if path.stem != "default":
            model = load_config([f"model={path.stem}"]).model.path
            assert dimensions_file(model) is not None, path


def test_unknown_models_have_none_and_broken_files_are_named(tmp_path: Path) -> None:
    assert known_shape("models/Other") is None
    assert known_shape("") is None
    folder = tmp_path / "model" / "dimensions"
    folder.mkdir(parents=True)
    (folder / "Broken.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    (folder / "List.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="hidden_size is missing"):
        known_shape("x/Broken", tmp_path)
    with pytest.raises(ConfigError, match="not a JSON object"):
        known_shape("x/List", tmp_path)


def test_every_paper_preset_has_an_example_and_no_example_another_preset() -> None:
    examples = Path(__file__).resolve().parents[2] / "examples"
    texts = [path.read_text(encoding="utf-8") for path in examples.rglob("*.*") if path.is_file()]
    named = {name for text in texts for name in re.findall(r"experiment=([\w.]+)(?![\w.$])", text)}
    presets = {path.stem for path in PRESETS}
    assert named <= presets
    assert {name for name in presets if not name.startswith("arithmetic")} <= named

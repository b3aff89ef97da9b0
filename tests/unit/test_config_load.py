"""Composition, typing and error messages of the configuration."""

import logging
from pathlib import Path

import hydra
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osft_mcore.config.load import default_config_dir, leaf_paths, load_config, to_yaml
from osft_mcore.config.schema import DataConfig, RunConfig, TrainConfig
from osft_mcore.errors import ConfigError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
REGENERATE = "run `python tools/regenerate_config_goldens.py` and review the diff"
PRESETS = sorted(path.stem for path in (default_config_dir() / "experiment").glob("*.yaml"))
CHOICES = sorted(
    f"{path.parent.name}={path.stem}" for path in default_config_dir().glob("*/*.yaml")
)


def problems_of(*overrides: str, config_dir: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides, config_dir)
    return list(caught.value.problems)


def folder_with(tmp_path: Path, **files: str) -> Path:
    """A config folder; file names use `__` for `/`."""
    for name, text in files.items():
        path = tmp_path / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def test_without_choices_every_value_is_the_schemas_default() -> None:
    assert load_config([]) == RunConfig()


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_a_plain_override_reaches_an_option_that_no_yaml_file_sets(prefix: str) -> None:
    config = load_config([f"{prefix}rollout.tp=2", f"{prefix}seed=3"])
    assert (config.rollout.tp, config.seed) == (2, 3)


def test_a_tilde_takes_back_what_a_choice_set() -> None:
    assert load_config(["parallel=tp2"]).parallel.tp == 2
    assert load_config(["parallel=tp2", "~parallel.tp"]).parallel.tp == 1


def test_values_win_over_choices_and_presets_win_over_groups() -> None:
    preset = "experiment=osft_qwen2.5_math_7b"
    assert load_config([preset]).parallel.tp == 4
    assert load_config(["parallel.tp=2", preset]).parallel.tp == 2
    assert load_config([preset, "algorithm=coupled"]).rollout.tau_sample == 1.0
    assert load_config(["algorithm=coupled", "rollout.tau_sample=0.7"]).rollout.tau_sample == 0.7


def test_a_choice_that_the_preset_would_overwrite_is_refused() -> None:
    preset = "experiment=arithmetic_osft"
    [problem] = problems_of(preset, "algorithm=coupled")
    assert problem.startswith("algorithm=coupled: states rollout.tau_sample = 1.0, but")
    assert "experiment=arithmetic_osft states 0.6" in problem
    [problem] = problems_of("parallel=tp4_pp2", preset)
    assert "leave out parallel=tp4_pp2 and set parallel.tp itself" in problem
    assert load_config([preset, "parallel=tp2"]).parallel.sequence_parallel
    decided = load_config([preset, "parallel=tp4_pp2", "parallel.tp=1"]).parallel
    assert (decided.tp, decided.pp) == (1, 2)
    assert load_config([preset, "logging=wandb"]).logging.wandb


def test_whole_numbers_pass_for_numbers_and_lists_for_tuples() -> None:
    config = load_config(["train.lr=1", "evaluation.files=[a.parquet,b c.parquet]"])
    assert isinstance(config.train.lr, float)
    assert config.evaluation.files == ("a.parquet", "b c.parquet")


@pytest.mark.parametrize("devices", ["7", "6,7", "4-7,9", "0-1", "007"])
def test_an_option_that_is_a_text_takes_numbers_as_they_are_written(
    devices: str, tmp_path: Path
) -> None:
    config = load_config([f"evaluation.devices={devices}", "+evaluation.sweep=0:1:0.5"])
    assert config.evaluation.devices == devices
    # The process of evaluation.mode=async reads it from there.
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config([], tmp_path) == config


def test_a_text_with_commas_is_told_how_to_be_written() -> None:
    [problem] = problems_of("evaluation.devices=GPU-a,GPU-b")
    hint = "evaluation.devices='a,b'"
    assert problem.startswith("evaluation.devices: found several values")
    assert hint in problem
    assert load_config([hint]).evaluation.devices == "a,b"


def test_an_interpolation_reaches_a_schema_default() -> None:
    assert load_config(["rollout.tp=${train.micro_batch_size}"]).rollout.tp == 4


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_in_conf_composes(choice: str) -> None:
    load_config([choice])


def test_all_problems_come_back_in_one_error() -> None:
    problems = problems_of(
        "rollout.tau_sampl=0.6",
        "train.lr=fast",
        "model.dtype=fp16",
        "experiment=nothing",
        "seed",
        "logging.every=1,2",
    )
    assert len(problems) == 6
    assert "rollout.tau_sampl: unknown option; did you mean rollout.tau_sample?" in problems
    assert "train.lr: found 'fast', expected a number" in problems
    assert "model.dtype: found 'fp16', expected 'bf16' or 'fp32'" in problems
    assert any(problem.startswith("experiment=nothing: no such choice") for problem in problems)
    assert any(problem.startswith("'seed': not an override") for problem in problems)
    assert any(problem.startswith("logging.every: found several values") for problem in problems)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seed='3'", "seed: found '3', expected a whole number"),
        ("seed=true", "seed: found true, expected a whole number"),
        ("train.steps=1.5", "train.steps: found 1.5, expected a whole number"),
        (
            "train.recompute=some",
            "train.recompute: found 'some', expected 'none', 'selective' or 'full'",
        ),
        (
            "train.offload=gpu",
            "train.offload: found 'gpu', expected 'none', 'optimizer' or 'all'",
        ),
        ("train.lr=null", "train.lr: found null, expected a number"),
        ("train.lr='1e-7'", "train.lr: found '1e-7', expected a number"),
        ("train.lr=nan", "train.lr: found nan, expected a finite number"),
        ("train.lr=-inf", "train.lr: found -inf, expected a finite number"),
        ("train.steps=inf", "train.steps: found inf, expected a finite number"),
        ("logging.wandb=1", "logging.wandb: found 1, expected true or false"),
        ("data.train=[3]", "data.train: found [3], expected text"),
        ("evaluation.files=a.parquet", "evaluation.files: found 'a.parquet', expected a list"),
        ("evaluation.files=[1]", "evaluation.files.0: found 1, expected text"),
        ("rollout.annealing=3", "rollout.annealing: found 3, expected a section of options"),
        ("lr=1", "lr: unknown option; did you mean train.lr?"),
        ("train.tp=1", "train.tp: unknown option; did you mean parallel.tp or rollout.tp?"),
        ("rolout.tp=1", "rolout.tp: unknown option; did you mean rollout.tp?"),
        ("rollout.anealing.mode=off", "did you mean rollout.annealing.mode?"),
        ("zzzzzz=1", "zzzzzz: unknown option"),
        ("model=qwen2.5_math", "did you mean model=qwen2.5_math_7b?"),
        ("parallel=tp3", "available are 1x1, 1x8, 2x8, 8x8, default, tp2, tp4_pp2"),
        ("train=null", "train=null: no such choice"),
        ("hydra.run.dir=x", "set output_dir for the run folder"),
        ("=3", "'=3': not an override"),
        ("data.train=???", "data.train: has no value (???); set it"),
        ("rollout.tp=${parallel.nothing}", "Interpolation key 'parallel.nothing' not found"),
        ("~rollout.tp", "Could not delete from config"),
    ],
)
def test_one_wrong_override_is_one_problem_that_names_it(override: str, problem: str) -> None:
    problems = problems_of(override)
    assert len(problems) == 1
    assert problem in problems[0]


def test_a_folder_without_config_yaml_names_the_option(tmp_path: Path) -> None:
    assert problems_of(config_dir=tmp_path) == [
        f"--config-dir: no config.yaml in {str(tmp_path)!r}"
    ]


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"config": "train: {lr: 1e-5"}, "does not compose"),
        ({"config": "train: {lrr: 1}"}, "train.lrr: unknown option; did you mean train.lr?"),
        ({"config": "3: x"}, "3: unknown option"),
        ({"config": "train: [1]"}, "train: found [1], expected a section of options"),
        ({"config": "- a\n- b"}, "does not compose"),
        ({"config": "defaults: [model: gone]"}, "Could not find 'model/gone'"),
    ],
)
def test_a_broken_yaml_file_is_a_config_error(
    tmp_path: Path, files: dict[str, str], problem: str
) -> None:
    problems = problems_of(config_dir=folder_with(tmp_path, **files))
    assert len(problems) == 1
    assert problem in problems[0]


def test_composing_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    load_config(["seed=2"])
    load_config(["seed=3"])
    assert list(tmp_path.iterdir()) == []
    assert Path.cwd() == tmp_path
    assert (logging.getLogger().handlers, logging.getLogger().level) == (handlers, level)


def test_it_composes_where_hydra_is_already_in_use() -> None:
    with hydra.initialize_config_dir(str(default_config_dir()), version_base="1.3"):
        assert load_config(["seed=4"]).seed == 4


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    text=st.one_of(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])),
        st.sampled_from(["${seed}", "\\${seed}", "a\\\\${x}$", "null", "1e3", "a: b\n- c"]),
    ),
    lr=st.floats(min_value=0, allow_infinity=False),
)
def test_the_written_config_reads_back(
    tmp_path_factory: pytest.TempPathFactory, text: str, lr: float
) -> None:
    config = RunConfig(data=DataConfig(prompt_suffix=text), train=TrainConfig(lr=lr))
    folder = folder_with(tmp_path_factory.mktemp("run"), config=to_yaml(config))
    assert load_config([], folder) == config


def test_the_set_of_options_is_pinned() -> None:
    pinned = (GOLDEN / "config_keys.txt").read_text(encoding="utf-8").split()
    assert list(leaf_paths()) == pinned, REGENERATE
    assert len(pinned) < 150


def test_every_preset_has_a_golden_file() -> None:
    pinned = sorted(path.stem.removeprefix("config_") for path in GOLDEN.glob("config_*.yaml"))
    assert pinned == PRESETS, REGENERATE


@pytest.mark.parametrize("preset", PRESETS)
def test_the_resolved_preset_is_pinned(preset: str) -> None:
    pinned = (GOLDEN / f"config_{preset}.yaml").read_text(encoding="utf-8")
    assert to_yaml(load_config([f"experiment={preset}"])) == pinned, REGENERATE

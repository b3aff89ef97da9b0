"""Options of the KL penalty: what is without effect, and references that do not fit the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from models import save_random_model

from osft_mcore.config.check import absent_files, check
from osft_mcore.config.check_algorithm import algorithm_problems, reference_problems
from osft_mcore.config.load import load_config
from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.errors import ConfigError, WeightError
from osft_mcore.train.preflight import input_errors
from osft_mcore.weights.fingerprint import weights_fingerprint

KL = "algorithm.kl_coef=0.01"
SHORT = ("rollout.max_prompt_tokens=8", "rollout.max_response_tokens=8")


def problems_of(*overrides: str, samples: bool = True) -> list[str]:
    return list(algorithm_problems(load_config(overrides).algorithm, samples=samples))


@pytest.mark.parametrize(
    "overrides",
    [(KL,), (KL, "algorithm.kl_kind=k1", "algorithm.reference=there"), ("algorithm.kl_kind=k3",)],
)
def test_what_works_passes(overrides: tuple[str, ...]) -> None:
    assert problems_of(*overrides) == []


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("algorithm.kl_coef=-0.1", "algorithm.kl_coef: found -0.1, expected more than 0, or 0 for"),
        (
            "algorithm.kl_kind=k2",
            "algorithm.kl_kind: found 'k2', but with algorithm.kl_coef=0 there is no",
        ),
        (
            "algorithm.reference=there",
            "algorithm.reference: found 'there', but with algorithm.kl_coef=0 there is no",
        ),
    ],
)
@pytest.mark.parametrize("samples", [True, False])
def test_one_wrong_option_is_one_problem_that_names_it(
    override: str, problem: str, samples: bool
) -> None:
    [found] = problems_of(override, samples=samples)
    assert found.startswith(problem)


def test_given_answers_have_no_kl() -> None:
    [found] = problems_of(KL, "algorithm.reference=there", samples=False)
    assert found.startswith("algorithm.kl_coef: found 0.01, but osft sft does not sample")


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([KL, "algorithm.kl_kind=low_var_kl"])
    [found] = caught.value.problems
    assert "algorithm.kl_kind: found 'low_var_kl', expected 'k1', 'abs', 'k2' or 'k3'" in found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("kl") / "model")


def changed(model: Path, folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    content = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(content | changes), encoding="utf-8")
    return folder


def reference_of(model: Path, reference: Path, num_tokens: int = 100) -> list[str]:
    config = load_config([KL, f"algorithm.reference='{reference}'"])
    shape = read_model_shape(model)
    return list(reference_problems(config.algorithm, shape, num_tokens=num_tokens))


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("vocab_size", 68, "vocab is 68, expected 67"),
        ("num_hidden_layers", 3, "num_layers is 3, expected 2"),
        ("hidden_size", 128, "hidden is 128, expected 64"),
        ("rms_norm_eps", 1e-5, "norm_eps is 1e-05, expected 1e-06"),
        ("tie_word_embeddings", True, "tied is True, expected False"),
    ],
)
def test_a_reference_of_another_shape_is_refused(
    model: Path, tmp_path: Path, key: str, value: Any, found: str
) -> None:
    [problem] = reference_of(model, changed(model, tmp_path / "other", **{key: value}))
    assert problem.startswith(f"algorithm.reference: {found} as in model.path; name a model of")


def test_a_reference_needs_positions_enough_and_no_more(model: Path, tmp_path: Path) -> None:
    shorter = changed(model, tmp_path / "shorter", max_position_embeddings=99)
    assert reference_of(model, shorter, num_tokens=99) == []
    [problem] = reference_of(model, shorter, num_tokens=100)
    assert problem.startswith("algorithm.reference: the model has 99 positions, but rollout.")


def test_a_config_that_is_none_is_the_references(model: Path, tmp_path: Path) -> None:
    [problem] = reference_of(model, changed(model, tmp_path / "other", model_type="gpt2"))
    assert problem.startswith("algorithm.reference: ")
    assert "model_type 'gpt2'" in problem
    assert "model.path" not in problem


def found_by_check(model: Path, *overrides: str, need_files: bool = True) -> list[str]:
    config = load_config([f"model.path='{model}'", *SHORT, *overrides])
    try:
        check(config, world_size=1, phase="train", device="cpu", need_files=need_files)
    except ConfigError as error:
        return [line for line in error.problems if line.startswith("algorithm.")]
    return []


def test_a_start_reports_a_reference_that_is_absent_or_does_not_fit(
    model: Path, tmp_path: Path
) -> None:
    absent = (KL, f"algorithm.reference='{tmp_path / 'nowhere'}'")
    [problem] = found_by_check(model, *absent)
    assert problem.startswith("algorithm.reference: no config.json in ")
    assert found_by_check(model, *absent, need_files=False) == []
    assert problem in absent_files(load_config(absent), "train")
    other = changed(model, tmp_path / "other", vocab_size=99)
    [problem] = found_by_check(model, KL, f"algorithm.reference='{other}'")
    assert problem.startswith("algorithm.reference: vocab is 99, expected 67")
    fits = changed(model, tmp_path / "fits", max_position_embeddings=16)
    assert found_by_check(model, KL, f"algorithm.reference='{fits}'") == []


def test_a_reference_without_weights_is_found_before_anything_is_built(
    model: Path, tmp_path: Path
) -> None:
    empty = changed(model, tmp_path / "empty")
    reference, out = f"algorithm.reference='{empty}'", f"output_dir='{tmp_path / 'run'}'"
    config = load_config([f"model.path='{model}'", KL, reference, out, *SHORT])
    errors = [e for e in input_errors(config, "train") if isinstance(e, WeightError)]
    assert len(errors) == 1
    assert str(errors[0]).startswith(f"algorithm.reference: {empty}: ")


def test_the_fingerprint_tells_weights_apart_and_not_files(tmp_path: Path) -> None:
    one = save_random_model(tmp_path / "one")
    same = save_random_model(tmp_path / "same")
    other = save_random_model(tmp_path / "other", seed=1)
    assert weights_fingerprint(one) == weights_fingerprint(same)
    assert weights_fingerprint(one) != weights_fingerprint(other)
    model = transformers.AutoModelForCausalLM.from_pretrained(one)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert weights_fingerprint(one) == weights_fingerprint(tmp_path / "sharded")
    norm = dict(model.named_parameters())["model.norm.weight"]
    norm.data[-1] += 1e-3
    model.save_pretrained(tmp_path / "changed")
    assert weights_fingerprint(one) != weights_fingerprint(tmp_path / "changed")

"""Options of the objective: contradictions, options without effect, and the choices in conf/."""

import pytest

from osft_mcore.config.check import check
from osft_mcore.config.check_algorithm import algorithm_problems
from osft_mcore.config.load import load_config
from osft_mcore.config.schema import AlgorithmConfig
from osft_mcore.errors import ConfigError
from osft_mcore.train.schedules import train_temperature


def problems_of(*overrides: str, samples: bool = True) -> list[str]:
    return list(algorithm_problems(load_config(overrides).algorithm, samples=samples))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("algorithm.tau_train=0.8",),
        ("algorithm.objective=entropy", "algorithm.entropy_coef=0.5", "algorithm.tau_train=0.8"),
        ("algorithm.objective=entropy", "algorithm.entropy_coef=1"),
        ("algorithm.follow_tau_sample=true",),
        ("algorithm.follow_tau_sample=true", "algorithm.tau_train=1"),
        ("algorithm=osft",),
        ("algorithm=coupled",),
        ("algorithm=em_ft",),
        ("algorithm=em_ft", "rollout.annealing.mode=linear"),
    ],
)
def test_what_works_passes(overrides: tuple[str, ...]) -> None:
    assert problems_of(*overrides) == []


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ("algorithm.entropy_coef=0.5",),
            "algorithm.entropy_coef: found 0.5, but algorithm.objective=cross_entropy does not use",
        ),
        (("algorithm.entropy_coef=0",), "algorithm.entropy_coef: found 0, but algorithm.objective"),
        (
            ("algorithm=em_ft", "algorithm.entropy_coef=0"),
            "algorithm.entropy_coef: found 0, expected more than 0",
        ),
        (
            ("algorithm=em_ft", "algorithm.entropy_coef=-1"),
            "algorithm.entropy_coef: found -1, expected more than 0",
        ),
        (
            ("algorithm.follow_tau_sample=true", "algorithm.tau_train=0.8"),
            "algorithm.tau_train: found 0.8, but with algorithm.follow_tau_sample=true the",
        ),
        (("algorithm=em_ft", "algorithm.tau_train=0.6"), "algorithm.tau_train: found 0.6, but"),
    ],
)
def test_one_wrong_option_is_one_problem_that_names_it(
    overrides: tuple[str, ...], problem: str
) -> None:
    [found] = problems_of(*overrides)
    assert found.startswith(problem)


def test_without_sampling_there_is_no_temperature_to_follow_and_no_entropy_to_minimise() -> None:
    assert problems_of(samples=False) == []
    [follow] = problems_of("algorithm.follow_tau_sample=true", samples=False)
    assert follow.startswith("algorithm.follow_tau_sample: osft sft does not sample")
    [objective] = problems_of("algorithm.objective=entropy", samples=False)
    assert objective.startswith("algorithm.objective: entropy does not learn the given answers")
    named = [problem.split(":")[0] for problem in problems_of("algorithm=em_ft", samples=False)]
    assert named == ["algorithm.follow_tau_sample", "algorithm.objective"]


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        ("train", {"algorithm.tau_train"}),
        ("sft", {"algorithm.follow_tau_sample", "algorithm.objective"}),
    ],
)
def test_a_start_reports_them(phase: str, expected: set[str]) -> None:
    config = load_config(["algorithm=em_ft", "algorithm.tau_train=0.8"])
    with pytest.raises(ConfigError) as caught:
        check(config, world_size=1, phase=phase, device="cpu", need_files=False)
    named = {problem.split(":")[0] for problem in caught.value.problems}
    assert {name for name in named if name.startswith("algorithm.")} == expected


@pytest.mark.parametrize("value", ["0", "-0.5"])
@pytest.mark.parametrize(
    "option", ["algorithm.tau_train", "rollout.tau_sample", "rollout.annealing.end_tau"]
)
def test_temperatures_are_positive(option: str, value: str) -> None:
    """All that tau_train may be, with follow_tau_sample too."""
    with pytest.raises(ConfigError) as caught:
        check(
            load_config([f"{option}={value}"]),
            world_size=1, phase="train", device="cpu", need_files=False,
        )  # fmt: skip
    assert f"{option}: found {value}, expected more than 0" in caught.value.problems


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (
            "algorithm.objective=entropy_minimization",
            "algorithm.objective: found 'entropy_minimization', expected 'cross_entropy' or "
            "'entropy'",
        ),
        ("algorithm.entropy_coef=much", "algorithm.entropy_coef: found 'much', expected a number"),
        ("algorithm.entropy_coef=inf", "algorithm.entropy_coef: found inf, expected a finite"),
        ("algorithm.follow_tau_sample=1", "algorithm.follow_tau_sample: found 1, expected true or"),
        ("algorithm.follow_tau=true", "did you mean algorithm.follow_tau_sample?"),
        ("algorithm=emft", "did you mean algorithm=em_ft?"),
    ],
)
def test_unknown_values_are_named(override: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([override])
    [found] = caught.value.problems
    assert problem in found


def test_em_ft_is_the_reference_systems() -> None:
    config = load_config(["algorithm=em_ft"])
    expected = AlgorithmConfig(objective="entropy", entropy_coef=1.0, follow_tau_sample=True)
    assert config.algorithm == expected
    assert config.rollout.tau_sample == 1.0
    assert config.train == load_config([]).train


@pytest.mark.parametrize(("follow", "expected"), [(False, 0.8), (True, 0.6)])
def test_the_temperature_of_the_loss(follow: bool, expected: float) -> None:
    algorithm = AlgorithmConfig(tau_train=0.8, follow_tau_sample=follow)
    assert train_temperature(algorithm, 0.6) == expected

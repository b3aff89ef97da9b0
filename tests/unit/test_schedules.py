import math
from dataclasses import replace

import pytest

from osft_mcore.config.schema import AnnealingConfig, TrainConfig
from osft_mcore.train.schedules import learning_rate, sampling_temperature

# Reference values: 942 steps in 3 epochs, 0.6 -> 1.0 over 2 epochs.
ORACLE = {
    1: (0.600000, 0.600000),
    100: (0.663057, 0.624030),
    157: (0.699363, 0.657873),
    315: (0.800000, 0.800000),
    472: (0.900000, 0.941421),
    628: (0.999363, 0.999997),
    629: (1.0, 1.0),
    942: (1.0, 1.0),
}


@pytest.mark.parametrize(("step", "expected"), ORACLE.items())
def test_t10_annealing_equals_the_reference(step: int, expected: tuple[float, float]) -> None:
    linear = AnnealingConfig(mode="linear", end_tau=1.0, epochs=2)
    for annealing, tau in zip((linear, replace(linear, mode="cosine")), expected, strict=True):
        found = sampling_temperature(0.6, annealing, step=step, steps_per_epoch=314)
        assert found == pytest.approx(tau, abs=5e-7)


def test_without_annealing_the_temperature_is_constant() -> None:
    off = AnnealingConfig(mode="off", end_tau=1.0)
    for step in (1, 500, 942):
        assert sampling_temperature(0.6, off, step=step, steps_per_epoch=314) == 0.6


def test_steps_override_epochs() -> None:
    annealing = AnnealingConfig(mode="linear", end_tau=1.0, epochs=2, steps=4)
    taus = [
        sampling_temperature(0.2, annealing, step=step, steps_per_epoch=314) for step in range(1, 7)
    ]
    assert taus == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_a_run_shorter_than_its_epochs_still_anneals() -> None:
    annealing = AnnealingConfig(mode="linear", end_tau=1.0, epochs=2)
    taus = [
        sampling_temperature(0.6, annealing, step=step, steps_per_epoch=1) for step in (1, 2, 3)
    ]
    assert taus == pytest.approx([0.6, 0.8, 1.0])


def test_warmup_trains_its_first_batch() -> None:
    train = TrainConfig(lr=1e-3, lr_warmup_steps=10, lr_schedule="constant")
    rates = [learning_rate(train, step=step, total_steps=100) for step in (1, 5, 10, 11, 100)]
    assert rates == pytest.approx([1e-4, 5e-4, 1e-3, 1e-3, 1e-3])


def test_no_warmup_starts_at_the_full_rate() -> None:
    train = TrainConfig(lr=1e-3, lr_warmup_steps=0, lr_schedule="constant")
    assert learning_rate(train, step=1, total_steps=5) == 1e-3


def test_cosine_runs_from_the_end_of_warmup_to_the_last_step() -> None:
    train = TrainConfig(lr=1e-3, lr_warmup_steps=10, lr_schedule="cosine", lr_min_ratio=0.1)
    rates = [learning_rate(train, step=step, total_steps=110) for step in (5, 10, 35, 60, 110, 200)]
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    assert rates == pytest.approx([5e-4, 1e-3, quarter * 1e-3, 5.5e-4, 1e-4, 1e-4])


def test_cosine_in_a_run_that_ends_within_warmup() -> None:
    train = TrainConfig(lr=1e-3, lr_warmup_steps=10, lr_schedule="cosine")
    rates = [learning_rate(train, step=step, total_steps=5) for step in (1, 5)]
    assert rates == pytest.approx([1e-4, 5e-4])

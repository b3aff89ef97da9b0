"""Temperatures and learning rate, as pure functions of the step (counted from 1)."""

import math

from osft_mcore.config.schema import AlgorithmConfig, AnnealingConfig, TrainConfig


def sampling_temperature(
    tau_sample: float,
    annealing: AnnealingConfig,
    *,
    step: int,
    steps_per_epoch: int,
) -> float:
    """Temperature of the training answers at `step`.

    Over the first A steps from `tau_sample` to `annealing.end_tau`, then `end_tau`; step 1 is
    exactly `tau_sample`. A is `annealing.steps`, or `annealing.epochs` passes over the data.
    """
    if annealing.mode == "off":
        return tau_sample
    length = annealing.steps
    if length is None:
        length = max(1, annealing.epochs * steps_per_epoch)
    done = max(0, step - 1)
    if done >= length:
        return annealing.end_tau
    progress = done / length
    if annealing.mode == "linear":
        return tau_sample + (annealing.end_tau - tau_sample) * progress
    remaining = 0.5 * (1 + math.cos(math.pi * progress))
    return annealing.end_tau - (annealing.end_tau - tau_sample) * remaining


def train_temperature(algorithm: AlgorithmConfig, tau_sample: float) -> float:
    """Temperature of the loss in a step whose answers were sampled at `tau_sample`."""
    return tau_sample if algorithm.follow_tau_sample else algorithm.tau_train


def learning_rate(train: TrainConfig, *, step: int, total_steps: int) -> float:
    """Learning rate at `step`: linear warm-up, then constant or cosine.

    The warm-up factor is step / lr_warmup_steps, so that step 1 learns. (The reference systems
    count from 0 and train their first batch at learning rate 0.) The cosine starts after the
    warm-up and reaches lr * lr_min_ratio at `total_steps`.
    """
    warmup = train.lr_warmup_steps
    if step < warmup:
        return train.lr * step / warmup
    if train.lr_schedule == "constant":
        return train.lr
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    factor = train.lr_min_ratio + (1 - train.lr_min_ratio) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )
    return train.lr * factor

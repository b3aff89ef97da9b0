"""How the temperatures of a run are put into words."""

from osft_mcore.config.schema import AnnealingConfig, RunConfig


def sampling_words(tau_sample: float, annealing: AnnealingConfig) -> str:
    """`0.6`, or with annealing `0.6 to 1, linear, over 15 steps`."""
    if annealing.mode == "off":
        return f"{tau_sample:g}"
    number, unit = annealing.steps, "step"
    if number is None:
        number, unit = annealing.epochs, "epoch"
    length = f"{number} {unit}{'' if number == 1 else 's'}"
    return f"{tau_sample:g} to {annealing.end_tau:g}, {annealing.mode}, over {length}"


def temperatures(config: RunConfig) -> dict[str, float | str]:
    """tau_sample and tau_train: a number where it stays the same, words where it is annealed."""
    rollout, algorithm = config.rollout, config.algorithm
    tau_sample: float | str = rollout.tau_sample
    if rollout.annealing.mode != "off":
        tau_sample = sampling_words(rollout.tau_sample, rollout.annealing)
    tau_train = tau_sample if algorithm.follow_tau_sample else algorithm.tau_train
    return {"tau_sample": tau_sample, "tau_train": tau_train}

"""What a run says of its temperatures: where they begin, and where they end."""

import pytest
from layouts import model

from osft_mcore.config.load import load_config
from osft_mcore.config.temperature import temperatures
from osft_mcore.log.console import Console
from osft_mcore.train.start import say_start

LINEAR = ["rollout.annealing.mode=linear", "rollout.annealing.steps=15"]
COSINE = ["rollout.annealing.mode=cosine", "rollout.annealing.epochs=1"]
FOLLOWS = ["algorithm.follow_tau_sample=true"]
OVER_STEPS, OVER_EPOCHS = "0.6 to 1, linear, over 15 steps", "0.6 to 1, cosine, over 1 epoch"


@pytest.mark.parametrize(
    ("options", "tau_sample", "tau_train", "line"),
    [
        ([], 0.6, 1.0, "tau_sample 0.6 (annealing off), tau_train 1, lr"),
        (FOLLOWS, 0.6, 0.6, "tau_sample 0.6 (annealing off), tau_train the same, lr"),
        (LINEAR, OVER_STEPS, 1.0, f"tau_sample {OVER_STEPS}, tau_train 1, lr"),
        (COSINE + FOLLOWS, OVER_EPOCHS, OVER_EPOCHS, f"tau_sample {OVER_EPOCHS}, tau_train the"),
    ],
)
def test_annealed_temperatures_are_told_with_their_end(
    options: list[str],
    tau_sample: float | str,
    tau_train: float | str,
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = load_config(options)
    assert temperatures(config) == {"tau_sample": tau_sample, "tau_train": tau_train}
    say_start(Console(enabled=True), config, model(), num_steps=20)
    assert f"\n{line}" in capsys.readouterr().out

"""Random number generators go on where they were."""

import json
import random

import numpy as np
import torch

from osft_mcore.parallel.rng import rng_state, set_rng_state


def draws() -> list[float]:
    return [random.gauss(0, 1), float(np.random.normal()), float(torch.randn(()))]


def test_generators_go_on_where_they_were() -> None:
    # One normal number is made of two draws and keeps the second: that is state as well.
    random.gauss(0, 1)
    np.random.normal()
    state = json.loads(json.dumps(rng_state()))
    first = draws()
    assert draws() != first
    set_rng_state(state)
    assert draws() == first

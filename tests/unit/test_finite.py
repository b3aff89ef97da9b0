"""NaN and infinity are found wherever they are, and named."""

import math

import pytest
import torch

from osft_mcore.weights.finite import all_finite, non_finite

NUM_ELEMENTS = 67
"""More than a vector register holds, and no multiple of one."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_place_is_looked_at(dtype: torch.dtype, value: float) -> None:
    # Neither large values, whose sum is infinite, nor zeros are a fault.
    weights = torch.full((NUM_ELEMENTS,), torch.finfo(dtype).max, dtype=dtype)
    weights[::3], weights[1::3] = 0.0, torch.finfo(dtype).min
    others = [torch.zeros(0, 4), torch.tensor(1.0)]
    assert all_finite([weights, *others])
    for place in range(NUM_ELEMENTS):
        broken = weights.clone()
        broken[place] = value
        assert not all_finite([*others, broken]), place


def test_a_double_beyond_float32_is_finite() -> None:
    assert all_finite([torch.tensor([1e300, -1e300], dtype=torch.float64)])


def test_strided_parameters_are_read_where_they_are() -> None:
    memory = torch.zeros(4, 6)
    memory[:, 5] = math.nan
    assert all_finite([memory[:, :5]])
    assert not all_finite([memory.T[4:]])


def test_the_broken_ones_are_named_but_not_all_of_very_many() -> None:
    params = {f"layer.{i}": torch.zeros(2) for i in range(6)}
    assert non_finite(params) == []
    assert non_finite({}) == []
    params["layer.4"][1] = math.nan
    assert non_finite(params) == ["1 of the actor's 6 parameters hold NaN or infinity: 'layer.4'"]
    for i in (0, 2, 3, 5):
        params[f"layer.{i}"][0] = math.inf
    assert non_finite(params) == [
        "5 of the actor's 6 parameters hold NaN or infinity: 'layer.0', 'layer.2', 'layer.3' "
        "and 2 more"
    ]

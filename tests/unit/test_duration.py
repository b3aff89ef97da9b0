"""Durations as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osft_mcore.config.duration import seconds


@pytest.mark.parametrize(
    ("text", "expected"),
    [("45s", 45), ("90m", 5400), ("3h50m", 13800), ("1h30m10s", 5410), ("2h5s", 7205)],
)
def test_hours_minutes_seconds(text: str, expected: float) -> None:
    assert seconds(text) == expected


@given(hours=st.integers(0, 99), minutes=st.integers(0, 999), secs=st.integers(1, 999))
def test_parts_add_up(hours: int, minutes: int, secs: int) -> None:
    assert seconds(f"{hours}h{minutes}m{secs}s") == 3600 * hours + 60 * minutes + secs


@pytest.mark.parametrize("text", ["", "90", "3 h", "1.5h", "-5m", "5m1h", "1h1h", "90M", "2d"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"^found '.*', expected hours.*as in 3h50m, 90m or 45s$"):
        seconds(text)


@pytest.mark.parametrize("text", ["0s", "0h0m0s"])
def test_no_time_at_all_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected more than 0"):
        seconds(text)

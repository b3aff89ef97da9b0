"""Durations as people write them: 3h50m, 90m, 45s."""

import re
from typing import Final

LONGEST_MINUTES: Final = 30 * 24 * 60
"""Timers take no infinity."""
_DURATION: Final = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def seconds(text: str) -> float:
    """Seconds of a duration such as `1h30m10s`; raises ValueError, which says what is wrong."""
    found = _DURATION.fullmatch(text)
    if text == "" or found is None:
        raise ValueError(
            f"found {text!r}, expected hours, minutes and seconds in whole numbers, as in 3h50m, "
            "90m or 45s"
        )
    hours, minutes, secs = (int(number or 0) for number in found.groups())
    total = float(3600 * hours + 60 * minutes + secs)
    if total == 0:
        raise ValueError(f"found {text!r}, expected more than 0")
    return total

"""How long a phase may take: by its option, and by how long it took before."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

from osft_mcore.config.duration import LONGEST_MINUTES
from osft_mcore.config.schema import DeadlinesConfig

IDLE: Final = "idle"
"""A phase without a deadline: ranks wait for work."""
BETWEEN: Final = "what comes between phases"
"""Nothing there takes long, once the run has begun."""
STEADY: Final = ("rollout", "train", "sync", BETWEEN)
"""Alike in every step, so that the steps before tell how long is too long. An evaluation of another
temperature or a final export is not."""
LEAST_S: Final = 300.0
"""No limit gets shorter by itself: a busy disk or a paused machine is no fault."""
FOR_EVER_S: Final = 60.0 * LONGEST_MINUTES
OPTIONS: Final = {
    BETWEEN: "deadlines.start",
    "load": "deadlines.start",
    "wait": "evaluation.wait_minutes",
}
"""Of phases that do not have their option's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Of one stay in a phase."""

    seconds: float
    option: str
    """What to change if it is too short, and why it is what it is."""

    @property
    def minutes(self) -> str:
        """To be read."""
        return f"{round(self.seconds / 60, 2):g} minutes"


class Deadlines:
    """The limits of one rank. It decides alone: how long a phase took differs from rank to rank."""

    def __init__(
        self, by_phase_s: Mapping[str, float], *, otherwise_s: float, slack: float
    ) -> None:
        """Seconds by phase; `otherwise_s` for others.

        A STEADY phase that was over once may from then on take `slack` times its longest so far,
        at least LEAST_S and at most what is its own; 0: always that.
        """
        self._by_phase_s, self._otherwise_s, self._slack = by_phase_s, otherwise_s, slack
        self._longest_s: dict[str, float] = {}

    def limit(self, phase: str) -> Limit:
        """Of the next stay."""
        whole_s = min(self._by_phase_s.get(phase, self._otherwise_s), FOR_EVER_S)
        option = OPTIONS.get(phase, f"deadlines.{phase}")
        if phase == IDLE:
            return Limit(seconds=FOR_EVER_S, option=option)
        longest_s = self._longest_s.get(phase)
        if longest_s is None or not self._slack:
            return Limit(seconds=whole_s, option=option)
        shorter_s = max(LEAST_S, self._slack * longest_s)
        if shorter_s >= whole_s:
            return Limit(seconds=whole_s, option=option)
        longest = f"{self._slack:g} times the longest so far, {longest_s:.1f} s"
        return Limit(
            seconds=shorter_s,
            option=f"deadlines.slack: {longest}, but at least {LEAST_S / 60:g} minutes",
        )

    def note(self, phase: str, seconds: float) -> None:
        """A stay is over."""
        if phase not in STEADY or (phase == BETWEEN and "train" not in self._longest_s):
            # Until the first update, what comes between phases belongs to the start.
            return
        self._longest_s[phase] = max(seconds, self._longest_s.get(phase, 0.0))


def deadlines_of(config: DeadlinesConfig, *, wait_minutes: float) -> Deadlines:
    """As the options say. `wait_minutes`: for scores, which ends by itself after so long."""
    minutes = asdict(config)
    slack = minutes.pop("slack")
    minutes["wait"] = wait_minutes + config.start
    return Deadlines(
        {phase: 60 * limit for phase, limit in minutes.items()},
        otherwise_s=60 * config.start,
        slack=slack,
    )

"""What became of answers: right, wrong, without a final answer, ungraded; pure.

Every answer is exactly one of four, so that their rates add up to 1:

* correct: its score is above 0;
* format error: the scorer found no final answer to look at (status `no_answer`);
* logic error: there was one, and it was graded as wrong;
* ungraded: nobody knows, because grading took too long, failed, or the answer is too large for it.

In the figures under a condition an ungraded answer is neither parsed nor a format error: it is left
out of correct and logic error given parsed, and counts among the answers that were not truncated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from osft_mcore.evaluation.scorers import Grade

Outcome = Literal["correct", "format_error", "logic_error", "ungraded"]
OUTCOMES: Final[tuple[Outcome, ...]] = ("correct", "format_error", "logic_error", "ungraded")
UNGRADED: Final = ("timeout", "error", "too_large")
NEED_FORMAT: Final = (
    "format_error",
    "logic_error",
    "format_error_given_not_truncated",
    "correct_given_parsed",
    "logic_error_given_parsed",
)
"""Rates that nobody knows of a scorer that does not say whether it found a final answer."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A share: the answers that count over those that could, by problem."""

    counts: tuple[int, ...]
    of: tuple[int, ...]

    @property
    def value(self) -> float | None:
        """Over all problems; None if there is nothing that could count."""
        return sum(self.counts) / sum(self.of) if any(self.of) else None


@dataclass(frozen=True, slots=True)
class Kind:
    """What matters of one answer."""

    outcome: Outcome
    truncated: bool

    @property
    def parsed(self) -> bool:
        """Graded, by a final answer that it has."""
        return self.outcome in ("correct", "logic_error")


def outcome_of(grade: Grade) -> Outcome:
    """The one of four."""
    if grade.correct:
        return "correct"
    if grade.status in UNGRADED:
        return "ungraded"
    return "format_error" if grade.status == "no_answer" else "logic_error"


def rates(problems: Sequence[Sequence[Kind]], *, tells_format: bool) -> dict[str, Rate]:
    """By name. `tells_format`: the scorer says so where it finds no final answer.

    Without that the rates of NEED_FORMAT are left out.
    """

    def rate(counts: Callable[[Kind], bool], of: Callable[[Kind], bool] = lambda _: True) -> Rate:
        return Rate(
            counts=tuple(sum(of(kind) and counts(kind) for kind in kinds) for kinds in problems),
            of=tuple(sum(map(of, kinds)) for kinds in problems),
        )

    def whole(outcome: Outcome) -> Rate:
        return rate(lambda kind: kind.outcome == outcome)

    found = {name: whole(name) for name in OUTCOMES} | {
        "format_error_given_not_truncated": rate(
            lambda kind: kind.outcome == "format_error", lambda kind: not kind.truncated
        ),
        "correct_given_parsed": rate(
            lambda kind: kind.outcome == "correct", lambda kind: kind.parsed
        ),
        "logic_error_given_parsed": rate(
            lambda kind: kind.outcome == "logic_error", lambda kind: kind.parsed
        ),
    }
    return {name: at for name, at in found.items() if tells_format or name not in NEED_FORMAT}

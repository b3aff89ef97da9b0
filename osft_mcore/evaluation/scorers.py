"""What a response is worth: scorers by name, as far as no foreign code is needed.

What needs computer algebra, or a scorer from a file, becomes a Question for a grading worker.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from types import MappingProxyType
from typing import Literal

from osft_mcore.evaluation.answers import after_hashes, last_answer_line, last_boxed
from osft_mcore.evaluation.limits import MAX_ANSWER_CHARS, too_large
from osft_mcore.evaluation.spelling import bare_answer, same_by_spelling

GradeStatus = Literal["ok", "no_answer", "too_large", "timeout", "error"]

Gold = str | int | float | Sequence[str | int | float]
"""An expected answer, or several of which one has to be met."""

_DECIMAL = re.compile(r"[+-]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})")


@dataclass(frozen=True, slots=True)
class Grade:
    """The score of one response."""

    score: float
    status: GradeStatus
    """`timeout` and `error` mean that nobody knows; they count as not correct. `too_large`: not
    handed to algebra, and not spelled as expected."""
    reason: str = field(default="", compare=False)
    """Of an error, for people."""

    @property
    def correct(self) -> bool:
        """True for a positive score."""
        return self.score > 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One response to be graded."""

    text: str
    gold: Gold
    num_tokens: int = 0
    """Of the response."""

    @property
    def golds(self) -> tuple[str, ...]:
        """The expected answers, as text."""
        several = [self.gold] if isinstance(self.gold, str | int | float) else self.gold
        return tuple(map(str, several))


@dataclass(frozen=True, slots=True)
class Question:
    """What a grading worker is asked."""

    answer: str
    golds: tuple[str, ...]
    num_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerOptions:
    """What scorers have to know besides the response."""

    max_tokens: int
    """Limit of a response."""
    overlong_buffer_tokens: int
    """Tokens before the limit that cost; 0: none do."""


Draft = Grade | Question
RIGHT, WRONG = Grade(1.0, "ok"), Grade(0.0, "ok")
NO_ANSWER = Grade(0.0, "no_answer")


def boxed_math(sample: Sample, options: ScorerOptions) -> Draft:
    r"""1 if the last `\boxed{}` equals a gold answer: by spelling, else by algebra."""
    return _boxed(sample, fast=False)


def boxed_math_fast(sample: Sample, options: ScorerOptions) -> Draft:
    """The same with as much algebra as needs no math-verify."""
    return _boxed(sample, fast=True)


def _boxed(sample: Sample, *, fast: bool) -> Draft:
    answer = last_boxed(sample.text)
    if answer is None or not answer.strip():
        return NO_ANSWER
    golds = tuple(last_boxed(gold) or gold for gold in sample.golds)
    verdicts = [_by_spelling(answer, gold, fast=fast) for gold in golds]
    if True in verdicts:
        return RIGHT
    open_golds = tuple(
        gold for gold, verdict in zip(golds, verdicts, strict=True) if verdict is None
    )
    if not open_golds:
        return WRONG
    readable = tuple(gold for gold in open_golds if too_large(gold) is None)
    if not readable:
        return Grade(0.0, "error", f"the expected answer has {too_large(open_golds[0])}")
    if reason := too_large(answer):
        return Grade(0.0, "too_large", reason)
    return Question(answer=answer, golds=readable)


def _by_spelling(answer: str, gold: str, *, fast: bool) -> bool | None:
    """Whether they are equal; None if only algebra can tell."""
    if max(len(answer), len(gold)) > MAX_ANSWER_CHARS:
        return True if answer.strip() == gold.strip() != "" else None
    return same_by_spelling(answer, gold, fast=fast)


def gsm8k(sample: Sample, options: ScorerOptions) -> Draft:
    """1 if the last `#### x` is, to the character, a gold answer without its commas."""
    answer = after_hashes(sample.text)
    if answer is None or not any(map(str.isdigit, answer)):
        return NO_ANSWER
    golds = [after_hashes(gold) or gold.strip().replace(",", "") for gold in sample.golds]
    return RIGHT if answer in golds else WRONG


def answer_line(sample: Sample, options: ScorerOptions) -> Draft:
    """+1 if the last `Answer:` line is spelled as a gold answer, else -1; overlong is less."""
    answer = last_answer_line(sample.text)
    penalty = overlong_penalty(sample.num_tokens, options)
    if answer is None:
        return Grade(-1.0 + penalty, "no_answer")
    wanted = {_after_equals(gold) for gold in sample.golds}
    return Grade((1.0 if _after_equals(answer) in wanted else -1.0) + penalty, "ok")


def _after_equals(text: str) -> str:
    return bare_answer(text[:MAX_ANSWER_CHARS].rpartition("=")[2])


def overlong_penalty(num_tokens: int, options: ScorerOptions) -> float:
    """0 up to the buffer, then down in a straight line to -1 at `max_tokens`."""
    buffer = options.overlong_buffer_tokens
    exceeding = num_tokens - (options.max_tokens - buffer)
    return -exceeding / buffer if buffer and exceeding > 0 else 0.0


def boxed_numeric(sample: Sample, options: ScorerOptions) -> Draft:
    r"""1 if the last `\boxed{}` holds a number equal to a gold one. No number is no answer."""
    answer = _number(last_boxed(sample.text))
    if answer is None:
        return NO_ANSWER
    golds = [_number(last_boxed(gold) or gold) for gold in sample.golds]
    if None in golds:
        return Grade(0.0, "error", f"an expected answer of {list(sample.golds)!r} is not a number")
    return RIGHT if answer in golds else WRONG


def _number(text: str | None) -> Decimal | None:
    if text is None or len(text) > MAX_ANSWER_CHARS:
        return None
    plain = bare_answer(text).replace(",", "")
    return Decimal(plain) if _DECIMAL.fullmatch(plain) else None


def from_file(sample: Sample, options: ScorerOptions) -> Draft:
    """Whatever the function in a file says, in a worker."""
    return Question(answer=sample.text, golds=sample.golds, num_tokens=sample.num_tokens)


def final_answer(text: str, scorer: str) -> str:
    """The answer that `scorer` looks at, spelled plainly, for counting votes; "" if there is none.

    A scorer from a file does not say what it looks at: its answers are taken to be boxed.
    """
    extract = {"gsm8k": after_hashes, "answer_line": last_answer_line}.get(scorer, last_boxed)
    answer = extract(text)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return "" if answer is None else answer
    return bare_answer(answer)


SCORERS: Mapping[str, Callable[[Sample, ScorerOptions], Draft]] = MappingProxyType(
    {
        "boxed_math": boxed_math,
        "boxed_math_fast": boxed_math_fast,
        "gsm8k": gsm8k,
        "answer_line": answer_line,
        "boxed_numeric": boxed_numeric,
    }
)
"""The names of config/schema_evaluation.py; any other is a file's."""

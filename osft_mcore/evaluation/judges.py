"""What a grading worker runs: the comparison by algebra, or a function from a user's file."""

import contextlib
import importlib.util
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Literal, NotRequired, Protocol, TypedDict

BOXED_MATH = "boxed_math"
BOXED_MATH_FAST = "boxed_math_fast"


class Reply(TypedDict):
    """One line of a worker's output."""

    kind: Literal["ready", "unusable", "scored", "late", "died", "error", "gone", "stuck"]
    score: NotRequired[float]
    reason: NotRequired[str]


class Judge(Protocol):
    """Replies to one question; no time limit of its own."""

    def __call__(self, *, answer: str, golds: list[str], num_tokens: int) -> Reply:
        """`golds`: one of them has to be met."""
        ...


class OutOfTimeError(BaseException):
    """A comparison used up its share. Not an Exception: libraries swallow those."""


def load_judge(scorer: str, timeout_s: float) -> Judge | str:
    """The judge, or why there is none."""
    if scorer in (BOXED_MATH, BOXED_MATH_FAST):
        return _algebra_judge(timeout_s, fast=scorer == BOXED_MATH_FAST)
    path, _, name = scorer.rpartition(":")
    try:
        spec = importlib.util.spec_from_file_location("osft_user_scorer", Path(path))
        if spec is None or spec.loader is None:
            return f"{path!r} is not a Python file"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # Whatever a user's file raises is the answer.
        return f"importing {path!r} failed: {_described(error)}"
    function = vars(module).get(name)
    if not callable(function):
        return f"{path!r} has no function {name!r}"
    return _file_judge(function)


def _file_judge(function: Callable[..., float]) -> Judge:
    def judge(*, answer: str, golds: list[str], num_tokens: int) -> Reply:
        try:
            gold = golds[0] if len(golds) == 1 else golds
            score = float(function(answer, gold, num_tokens))
        except Exception as error:  # Whatever a user's function raises is the answer.
            return {"kind": "error", "reason": _described(error)}
        if not math.isfinite(score):
            return {"kind": "error", "reason": f"the score is {score}, expected a finite number"}
        return {"kind": "scored", "score": score}

    return judge


def _algebra_judge(timeout_s: float, *, fast: bool) -> Judge:
    # Late: a user's scorer needs no algebra, and its import takes a second.
    from osft_mcore.evaluation.algebra import stages

    def judge(*, answer: str, golds: list[str], num_tokens: int) -> Reply:
        late, reasons = False, []
        for gold in golds:
            for stage in stages(fast=fast):
                verdict = None
                try:
                    # sympy may not use up the time of math-verify, which often knows better.
                    with _cpu_limit(timeout_s / 3):
                        verdict = stage(answer, gold)
                except OutOfTimeError:
                    late = True
                except Exception as error:  # The libraries raise anything.
                    reasons.append(_described(error))
                if verdict:
                    return {"kind": "scored", "score": 1.0}
                if verdict is False:
                    break
        if late:
            return {"kind": "late"}
        if reasons:
            return {"kind": "error", "reason": reasons[0]}
        return {"kind": "scored", "score": 0.0}

    # The first comparison loads grammars; no answer's time must pay for that.
    judge(answer=r"\frac{x}{3}", golds=["x/4"], num_tokens=0)
    return judge


@contextlib.contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError inside after so much CPU time: a busy machine changes no verdict.

    Of use where Python code runs; the parent ends everything else.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"

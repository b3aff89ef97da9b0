"""What a grading worker runs: the comparison by algebra, or a function from a user's file."""

import contextlib
import importlib.util
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Final, Literal, NotRequired, Protocol, TypedDict

BOXED_MATH = "boxed_math"
BOXED_MATH_FAST = "boxed_math_fast"


WARM_UP = (
    (r"\frac{x}{3}", "x/4"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    ("3x^2+4x+1", "(3x+1)(x+1)"),
    ("(1,7/2]", r"(1, \frac{7}{2}]"),
    ("(1,2)", "(1,3)"),
    (r"\{1,2\}", r"\{2,3\}"),
    (r"x=3\text{ cm}", r"3^\circ"),
    (r"\frac{\pi}{2}+1", r"\sin(x)"),
)
"""One of each usual kind, right and wrong."""


class Reply(TypedDict):
    """One line of a worker's output."""

    kind: Literal["ready", "unusable", "scored", "late", "died", "error", "gone", "stuck"]
    score: NotRequired[float]
    last: NotRequired[bool]
    """Of this child; the worker is `ready` again when the next has been forked."""
    reason: NotRequired[str]


class Judge(Protocol):
    """Replies to one question; no time limit of its own."""

    def __call__(self, *, answer: str, golds: list[str], num_tokens: int) -> Reply:
        """`golds`: one of them has to be met."""
        ...


AGAIN_S: Final = 0.1
"""Of CPU time, from one attempt to end a comparison to the next."""


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
    except (Exception, SystemExit) as error:  # Whatever a user's file raises is the answer.
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
        except (Exception, SystemExit) as error:  # Whatever a user's function raises is the answer.
            return {"kind": "error", "reason": _described(error)}
        if not math.isfinite(score):
            return {"kind": "error", "reason": f"the score is {score}, expected a finite number"}
        return {"kind": "scored", "score": score}

    return judge


def _algebra_judge(timeout_s: float, *, fast: bool) -> Judge:
    # Late: a user's scorer needs no algebra, and its import takes a second.
    from osft_mcore.evaluation.algebra import stages

    comparisons = stages(fast=fast)

    def judge(*, answer: str, golds: list[str], num_tokens: int) -> Reply:
        replies: list[Reply] = [{"kind": "scored", "score": 0.0} for _ in golds]
        undecided = list(range(len(golds)))
        # The cheap one on all of them before a dear one on any.
        for comparison in comparisons:
            # Each has its own time: math-verify may know what sympy does not.
            undecided = _compare_all(
                comparison, answer, golds, undecided, replies, cpu_s=timeout_s / 3
            )
            if any(reply.get("score") for reply in replies):
                break
        # What is right by one is right; what is not known of one is not known.
        return max(replies, key=lambda reply: (reply.get("score", 0.0), reply["kind"] != "scored"))

    # First comparisons load grammars and fill caches; no answer's time must pay for that.
    for answer, gold in WARM_UP:
        for comparison in comparisons:
            comparison(answer, gold)
    return judge


def _compare_all(
    comparison: Callable[[str, str], bool | None],
    answer: str,
    golds: Sequence[str],
    undecided: Sequence[int],
    replies: list[Reply],
    *,
    cpu_s: float,
) -> list[int]:
    """Which of `undecided` stay so; ends at the first that is right. Changes `replies`."""
    left: list[int] = []
    for num_done, k in enumerate(undecided):
        # A hard one leaves their share to those after it, an easy one also what it did not need.
        share_s = cpu_s / (len(undecided) - num_done)
        began = time.process_time()
        try:
            with cpu_limit(share_s):
                verdict = comparison(answer, golds[k])
        except OutOfTimeError:
            verdict, replies[k] = None, {"kind": "late"}
        except Exception as error:  # The libraries raise anything.
            verdict, replies[k] = None, {"kind": "error", "reason": _described(error)}
        cpu_s -= min(share_s, time.process_time() - began)
        if verdict:
            replies[k] = {"kind": "scored", "score": 1.0}
            break
        if verdict is None:
            left.append(k)
    return left


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError inside after so much CPU time: a busy machine changes no verdict.

    Of use where Python code runs; the parent ends everything else.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    signal.signal(signal.SIGPROF, stop)
    # Again and again: what is raised in a destructor, or while garbage is collected, is lost.
    signal.setitimer(signal.ITIMER_PROF, seconds, AGAIN_S)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        # It may have been raised just there.
        signal.setitimer(signal.ITIMER_PROF, 0)


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"

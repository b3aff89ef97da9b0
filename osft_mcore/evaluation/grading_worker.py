"""The process in which math-verify runs: JSON lines in, JSON lines out, no torch.

Run as `python -m osft_mcore.evaluation.grading_worker <timeout_s>` by grading.py. Model output is
hostile input to a computer algebra system, so memory is capped here and time by the parent.
"""

import json
import os
import resource
import signal
import sys
from typing import Literal, TypedDict

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

MEMORY_LIMIT_BYTES = 1 << 30

Verdict = Literal["ready", "correct", "wrong", "unreadable_gold"]


class Question(TypedDict):
    """One line of input."""

    gold: str
    answer: str


def judge(question: Question) -> Verdict:
    """Compare an answer with the gold answer by algebra; no time limit of its own."""
    gold, answer = (_expressions(question[key]) for key in ("gold", "answer"))
    if not gold:
        return "unreadable_gold"
    return "correct" if verify(gold, answer, timeout_seconds=None) else "wrong"


def _expressions(latex: str) -> list[object]:
    one_line = " ".join(latex.split())
    extraction = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    parsed: list[object] = parse(
        f"${one_line}$", extraction_config=extraction, parsing_timeout=None
    )
    return parsed


def main() -> None:
    """Answer questions until the parent closes the pipe."""
    timeout_s = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The default action kills: the parent is quicker, unless it is dead itself.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # What a library prints must not end up between the verdicts.
    replies = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    # The first comparison loads grammars; no answer's time must pay for that.
    judge({"gold": r"\frac{1}{2}", "answer": "0.5"})
    _reply(replies, "ready")
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 1)
        verdict = judge(json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(replies, verdict)


def _reply(descriptor: int, verdict: Verdict) -> None:
    os.write(descriptor, json.dumps({"verdict": verdict}).encode() + b"\n")


if __name__ == "__main__":
    main()

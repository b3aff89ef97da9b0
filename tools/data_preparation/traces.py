r"""Reasoning traces of a teacher, cleaned for `osft sft`: reasoning, then `\boxed{number}`.

A teacher that was told to write `ANSWER: <number>` talks about that in its reasoning. A student is
asked for a box, and must not learn to talk about another format.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

from data_preparation.sources import ReadRow

# A box with a value in it may close a step that counts; an empty one is talk.
_NAMED = (
    r"(?:answer\s*:|(?<!\\)\bboxed\b|\\boxed(?!\s*\{)"
    r"|\\boxed\s*\{\s*(?:\}|<|\.\.\.|number|answer))"
)
_FORMAT = rf"(?:{_NAMED}|final (?:answer|line|output)|required format)"
_SPEAK = r"(?:output|write|put|give|provide|present|format|state|print|box|return|finish|conclude)"
_META: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # What the writer is about to write.
        rf"^(?:now,? |then,? |so,? |and |finally,? )*i(?:'ll| will| shall| should| must| need to"
        rf"| have to| can| am going to|'m going to) (?:now |then |just |only |also )*{_SPEAK}\b"
        rf".*{_FORMAT}",
        rf"^(?:now,? |so,? |then,? )*let me (?:now )?{_SPEAK}\b.*{_FORMAT}",
        rf"^(?:now,? |so,? |then,? )*(?:we|i) (?:should|must|need to|have to) end\b.*{_FORMAT}",
        rf"^(?:now |then )?(?:output|write|put|give|print) (?:it |this )?(?:as|in|on)\b.*{_FORMAT}",
        r"^i(?:'ll| will| should| must| need to) (?:now )?(?:show|include|explain) (?:my|the|all)"
        r" (?:reasoning|work|steps|working)\b",
        # Where the answer is to stand.
        rf"^(?:and |then |but )?at the (?:very )?end\b.*{_FORMAT}",
        rf"^(?:and |then |but )?at the (?:very )?end\b,? (?:i|we|you)\b.*\b{_SPEAK}\b",
        rf"\bon (?:its|a|the) (?:own|new|separate|single|last|final) line\b.*{_FORMAT}",
        rf"{_FORMAT}.*\bon (?:its|a|the) (?:own|new|separate|single|last|final) line\b",
        rf"\b(?:last|final) line\b.*{_FORMAT}",
        # What was asked for.
        rf"\bthe (?:problem|question|prompt|user|instructions?|task)\b.*\b(?:says?|asks?|wants?|"
        rf"tells?|requires?|specif\w+|expects?)\b.*{_NAMED}",
        rf"\b(?:i am|i'm|we are|i was|we were) (?:asked|told|supposed|required|instructed) to\b"
        rf".*(?:{_FORMAT}|\bformat\b)",
        rf"\binstructions?\b.*{_FORMAT}",
        r"\bshow (?:your|my) (?:reasoning|work|steps|working)\b",
        r"\b(?:reasoning|explanation) (?:first|before),? (?:and )?(?:then )?(?:the )?answer\s*:",
        r"\bthink step by step\b",
        # The format itself.
        r"<number>",
        r"\banswer\s*:\s*(?:\[|<|\{)?\s*(?:number|num|x|value|result)\b",
        r"^(?:the )?(?:output|answer|response|required|final) format (?:is|should|must|says)\b",
        rf"^format\s*:.*{_FORMAT}",
        rf"\bin the (?:required|specified|requested|given|correct|exact) format\b.*{_FORMAT}",
        r"\b(?:no|without) (?:units?|commas?|extra|other|additional)\b.*\banswer\s*:",
        r"\banswer\s*:.*\b(?:no|without) (?:units?|commas?|extra|other|additional)\b",
        r"\b(?:only|just) the (?:number|numeric(?:al)? (?:value|answer))\b.*\banswer\s*:",
        r"\banswer\s*:.*\b(?:only|just) the (?:number|numeric(?:al)? (?:value|answer))\b",
        # An announcement with the answer behind it.
        r"^(?:so|thus|hence|therefore|then|now|finally|and|ok(?:ay)?|yes)\b.*"
        r"(?-i:\bANSWER\s*:)",
        r"^(?:the )?(?:final )?(?:output|response|line) (?:is|should be|will be|would be)\b.*"
        r"\banswer\s*:",
        r"^(?:i think )?(?:that's|that is|this is) (?:it|all|the final answer)[.!]?$",
        r"^(?:done|ready)[.!]?$",
    )
)
"""A line in which one of these is found says nothing about the question."""

_NUMBER = r"[-+]?\$?\s?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_ANSWER_LINE = re.compile(
    rf"^[*_`\s]*(?:final )?answer[*_`\s]*:[*_`\s]*{_NUMBER}\s*%?[*_`\s.]*$",
    re.IGNORECASE,
)
_LABELLED = re.compile(rf"\banswer[*_`\s]*:[*_`\s]*({_NUMBER})", re.IGNORECASE)
_ONLY_A_BOX = re.compile(r"^[$*\s]*\\boxed\s*\{[^{}]*\}[$*.\s]*$")
_ANY_NUMBER = re.compile(_NUMBER)
_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BLANK_LINES = re.compile(r"\n{3,}")

WRONG = "the answer is wrong"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleaned:
    """The pairs that are kept, and what became of the rest."""

    rows: tuple[dict[str, str | None], ...]
    num_read: int
    dropped: Counter[str]
    """Traces by reason."""
    changed: Counter[str]
    """Lines and boxes, of kept traces, by what was done to them."""


def clean_traces(traces: Iterable[ReadRow], *, wrong: Literal["drop", "keep"]) -> Cleaned:
    """Pairs of prompt and response, in order; an equal pair once.

    `wrong`: what to do with a trace whose field `correct` is false. One without is kept.
    """
    kept: dict[tuple[str, str], dict[str, str | None]] = {}
    dropped: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    num_read = 0
    for trace in traces:
        num_read += 1
        pair = trace if isinstance(trace, str) else _pair(trace, changed, wrong=wrong)
        if isinstance(pair, str):
            dropped[pair] += 1
        elif (key := (str(pair["prompt"]), str(pair["response"]))) in kept:
            dropped["the same prompt and response again"] += 1
        else:
            kept[key] = pair
    return Cleaned(rows=tuple(kept.values()), num_read=num_read, dropped=dropped, changed=changed)


def _pair(
    trace: dict[str, Any], changed: Counter[str], *, wrong: Literal["drop", "keep"]
) -> dict[str, str | None] | str:
    """Prompt, response and id of one trace, or why there is none."""
    question, reasoning = trace.get("question"), trace.get("reasoning")
    if not isinstance(question, str) or not question.strip():
        return "no question"
    if not isinstance(reasoning, str) or not reasoning.strip():
        return "no reasoning"
    if wrong == "drop" and trace.get("correct") is False:
        return WRONG
    number = final_number(trace.get("final_number"), trace.get("final"))
    if number is None:
        return "no final number"
    text, counts = clean_reasoning(reasoning)
    if not text:
        return "no reasoning once cleaned"
    changed += counts
    given_id = trace.get("id")
    return {
        "prompt": question,
        "response": f"{text}\n\n\\boxed{{{number}}}",
        "id": None if given_id is None else str(given_id),
    }


def final_number(given: Any, final: Any) -> str | None:
    """The number given, else the last one after `ANSWER:` in the final text, else its last one.

    Without commas and currency. None if there is no number.
    """
    if isinstance(given, int) and not isinstance(given, bool):
        return str(given)
    if isinstance(given, float) and math.isfinite(given):
        return str(int(given)) if given.is_integer() else str(given)
    if isinstance(given, str) and _ANY_NUMBER.fullmatch(given.strip()):
        return _plain(given)
    if not isinstance(final, str):
        return None
    found = _LABELLED.findall(final) or _ANY_NUMBER.findall(final)
    return _plain(found[-1]) if found else None


def _plain(number: str) -> str:
    return re.sub(r"[,$\s]", "", number)


def clean_reasoning(text: str) -> tuple[str, Counter[str]]:
    """The reasoning without talk about the format, and how much of what was taken away."""
    counts: Counter[str] = Counter()
    lines = []
    for line in text.splitlines():
        bare = line.strip().lstrip("-*# ").strip()
        if _ANSWER_LINE.match(line) or _ONLY_A_BOX.match(line):
            counts["answer lines dropped"] += 1
        elif any(pattern.search(bare) for pattern in _META):
            counts["lines about the format dropped"] += 1
        else:
            lines.append(line.rstrip())
    opened, num_boxes = without_boxes("\n".join(lines))
    if num_boxes:
        counts["boxes opened"] = num_boxes
    return _BLANK_LINES.sub("\n\n", opened).strip(), counts


def without_boxes(text: str) -> tuple[str, int]:
    """The text with its boxes opened, and how many; one that is never closed stays as it is."""
    start = count = 0
    while match := _BOX.search(text, start):
        end = _closing_brace(text, match.end())
        if end is None:
            start = match.end()
            continue
        # From its start again: boxes may be nested.
        start = match.start()
        text = text[: match.start()] + text[match.end() : end] + text[end + 1 :]
        count += 1
    return text, count


def _closing_brace(text: str, start: int) -> int | None:
    """Where the brace opened just before `start` is closed; escaped braces do not count."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None

"""One spelling for one answer, and what equal or plainly different spellings decide."""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

_DOLLARS = re.compile(r"\\?\$")
_DROPPED = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[,!]")
_SPACES = re.compile(r"(?:\s|~|\\[;: ]|\\q?quad(?![a-zA-Z]))+")
# A space between digits has a meaning ("1 1/2" is not "11/2"); any other has none.
_IDLE_SPACE = re.compile(r"(?<!\d) | (?!\d)")
_CONJUNCTION = re.compile(r"(?: ?, ?| )(?:or|and) ")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\{([^{}\\]*)\}")
_FRAC_NAME = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_FRAC_NUMERATOR = re.compile(r"\\frac ?(\d)(?=[\d{])")
_FRAC_DENOMINATOR = re.compile(r"(\\frac\{\d+\}) ?(\d)")
_SHORT_SQRT = re.compile(r"\\sqrt ?([0-9a-zA-Z])")
_INTEGER_FRAC = re.compile(r"(-?)\\frac\{(-?)(\d+)\}\{(\d+)\}")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")

_DEGREES = re.compile(r"\^(?:\\circ|\{\\circ\})|\\degree|\N{DEGREE SIGN}")
_LEFT_SIDE = re.compile(r"[a-zA-Z]{1,2}=(?!.*[=<>])")
_BRACKETED = re.compile(r"\(([^()\[\]{},]+)\)")
_LAST_TEXT = re.compile(
    r"(?<=[\w})\]!.])(?:\s|~|\\[ ,;:])*\\(?:text|textbf|textit|mathrm|mbox)\{([^{}\\]*)\}"
    r"(?:\^\{?[23]\}?)?[. ]*$"
)
_NUMBER_WORDS = ("hundred", "thousand", "million", "billion", "trillion", "dozen", "percent")
_LETTER_UNITS = frozenset("mshgNJWKVACL")
_UNITS = (
    "degrees?|deg|radians?|rad|dollars?|cents?|euros?|meters?|metres?|miles?|inch(?:es)?|yards?"
    "|feet|foot|ft|mm|cm|dm|km|nm|grams?|kg|mg|pounds?|lbs?|tons?|ounces?|oz|seconds?|sec|minutes?"
    "|mins?|hours?|hrs?|days?|weeks?|months?|years?|units?|points?|people|students?|ways?"
    "|square(?:cm|feet|inches|km|meters|miles|units|yards)|cubic(?:cm|feet|inches|meters|units)"
    "|sq|mph|kph|mL|ml|lit(?:er|re)s?|gallons?|times|games?|integers|solutions|edges|digits|Hz|km/h"
    "|m/s|cm/s"
)
_UNIT = re.compile(rf"(?<=[\d}}\])])(?:{_UNITS})(?:\^\{{?[23]\}}?)?$")

_VALUE = re.compile(
    # At most 20 digits a part: longer runs are compared as strings.
    r"(?P<whole>[+-]?\d{1,20}\.?)|(?P<decimal>[+-]?(?:\d{1,20}\.\d{1,20}|\.\d{1,20}))"
    r"|(?P<fraction>-?\d{1,20}/0*[1-9]\d{0,19})"
)
ROUNDING = Fraction(2, 10**6)
"""Decimals nearer than this are for math-verify to judge, which rounds to six places."""


def without_dollars(answer: str) -> str:
    """The answer without math delimiters and currency signs."""
    return _DOLLARS.sub("", answer).strip()


def normalize_answer(answer: str) -> str:
    """One spelling for answers that differ only in typesetting."""
    text = without_dollars(answer).replace("\u2212", "-").replace(r"\%", "%").replace("{,}", ",")
    text = _FRAC_NAME.sub(r"\\frac", _TEXT.sub(r"\1", _DROPPED.sub("", text)))
    text = _CONJUNCTION.sub(",", _SPACES.sub(" ", text).strip())
    text = _FRAC_NUMERATOR.sub(r"\\frac{\1}", text)
    text = _FRAC_DENOMINATOR.sub(r"\1{\2}", text)
    text = _SHORT_SQRT.sub(r"\\sqrt{\1}", text)
    text = _IDLE_SPACE.sub("", text).removesuffix(".")
    if fraction := _INTEGER_FRAC.fullmatch(text):
        sign = "-" if fraction[1] != fraction[2] else ""
        return f"{sign}{fraction[3]}/{fraction[4]}"
    whole, point, places = text.partition(".")
    if _THOUSANDS.fullmatch(whole.lstrip("+-")):
        return whole.replace(",", "") + point + places
    return text


def bare_answer(answer: str) -> str:
    """The same without what may be left out: `x =`, a unit, a percent sign, words at the end."""
    text = _LAST_TEXT.sub(_without_remark, without_dollars(answer))
    text = _DEGREES.sub("", normalize_answer(text)).removesuffix("%")
    text = _LEFT_SIDE.sub("", text, count=1) if _LEFT_SIDE.match(text) else text
    if bracketed := _BRACKETED.fullmatch(text):
        text = bracketed[1]
    # Again: what stood before the unit may be a number with commas.
    return normalize_answer(_UNIT.sub("", text))


def _without_remark(match: re.Match[str]) -> str:
    remark = match[1].strip()
    a_letter = len(remark) == 1 and remark not in _LETTER_UNITS
    kept = a_letter or remark.lower().startswith(_NUMBER_WORDS)
    return match.group() if kept else ""


def spellings(answer: str, gold: str) -> Iterator[tuple[str, str]]:
    """Ways to hold the two side by side.

    One of them may have something that the other leaves out; two units are not the same unit.
    """
    full_answer, full_gold = normalize_answer(answer), normalize_answer(gold)
    yield full_answer, full_gold
    yield bare_answer(answer), full_gold
    yield full_answer, bare_answer(gold)


def same_by_spelling(answer: str, gold: str, *, fast: bool) -> bool | None:
    """Whether two answers are the same, where their spelling already decides it.

    True for equal spellings and equal plain numbers, False for an empty answer and for two
    different plain numbers, None where only algebra can tell. `fast` is as strict as the fast
    mode's algebra: a fraction has to be spelled like the gold answer's, and "10%" is not 0.1.
    """
    if not bare_answer(answer):
        return False
    pairs = list(spellings(answer, gold))
    if any(_alike(one, other) for one, other in pairs if one):
        return True
    return _same_number(pairs, fast=fast)


def _alike(one: str, other: str) -> bool:
    words = one.isalpha() and other.isalpha()
    return one == other or (words and one.casefold() == other.casefold())


def _same_number(pairs: Sequence[tuple[str, str]], *, fast: bool) -> bool | None:
    matches = [(_VALUE.fullmatch(one), _VALUE.fullmatch(other)) for one, other in pairs]
    if any(one and other and _equal(one, other, fast) for one, other in matches):
        return True
    one, other = matches[1][0], matches[2][1]
    if one is None or other is None:
        return None
    (left, right), full = (Fraction(one[0]), Fraction(other[0])), pairs[0]
    in_percent = [spelling.endswith("%") for spelling in full]
    if in_percent == [True, False]:
        return True if left == 100 * right and not fast else None
    if in_percent == [False, True]:
        return True if right == 100 * left and not fast else None
    near = bool(one["decimal"] or other["decimal"]) and abs(left - right) < ROUNDING
    return None if near or left == right else False


def _equal(one: re.Match[str], other: re.Match[str], fast: bool) -> bool:
    if fast and "fraction" in (one.lastgroup, other.lastgroup):
        decimal = "decimal" in (one.lastgroup, other.lastgroup)
        return decimal and Fraction(one[0]) == Fraction(other[0])
    return Fraction(one[0]) == Fraction(other[0])

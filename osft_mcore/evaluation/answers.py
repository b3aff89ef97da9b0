"""Finding an answer in a response, and deciding the easy comparisons without algebra."""

import re
from decimal import Decimal

BOX = r"\boxed"

_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_DOLLARS = re.compile(r"\\?\$")
_DROPPED = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[,!]")
_SPACES = re.compile(r"(?:\s|~|\\[;: ]|\\q?quad(?![a-zA-Z]))+")
# A space between digits has a meaning ("1 1/2" is not "11/2"); any other has none.
_IDLE_SPACE = re.compile(r"(?<!\d) | (?!\d)")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\{([^{}\\]*)\}")
_FRAC_NAME = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_SHORT_FRAC = re.compile(r"\\frac(\d)(\d)(?!\d)")
_INTEGER_FRAC = re.compile(r"(-?)\\frac\{(\d+)\}\{(\d+)\}")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
# At most 20 digits a part: longer runs are compared as strings.
_NUMBER = re.compile(r"(?P<value>[+-]?(?:\d{1,20}(?:\.\d{0,20})?|\.\d{1,20}))(?P<percent>%?)")


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, braces matched (escaped braces do not count).

    None if the last `\boxed` is not closed or has no brace: an earlier one does not stand in.
    """
    start = text.rfind(BOX)
    if start < 0 or not text.startswith("{", start + len(BOX)):
        return None
    first = start + len(BOX) + 1
    depth = 1
    for match in _BRACES.finditer(text, first):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[first : match.start()]
    return None


def without_dollars(answer: str) -> str:
    """The answer without math delimiters and currency signs."""
    return _DOLLARS.sub("", answer).strip()


def normalize_answer(answer: str) -> str:
    """One spelling for answers that differ only in typesetting."""
    text = without_dollars(answer).replace("\u2212", "-").replace(r"\%", "%").replace("{,}", ",")
    text = _FRAC_NAME.sub(r"\\frac", _TEXT.sub(r"\1", _DROPPED.sub("", text)))
    text = _IDLE_SPACE.sub("", _SPACES.sub(" ", text).strip()).removesuffix(".")
    text = _SHORT_FRAC.sub(r"\\frac{\1}{\2}", text)
    if fraction := _INTEGER_FRAC.fullmatch(text):
        return "{}{}/{}".format(*fraction.groups())
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


def same_string(answer: str, gold: str) -> bool | None:
    """Whether two answers are the same, where their spelling already decides it.

    True for equal spellings and equal plain numbers, False for an empty answer and for two
    different whole numbers, None where only algebra can tell.
    """
    answer, gold = normalize_answer(answer), normalize_answer(gold)
    if not answer:
        return False
    if answer == gold:
        return True
    one, other = _NUMBER.fullmatch(answer), _NUMBER.fullmatch(gold)
    if one is None or other is None:
        return None
    return _same_number(one, other)


def _same_number(one: re.Match[str], other: re.Match[str]) -> bool | None:
    left, right = Decimal(one["value"]), Decimal(other["value"])
    if left == right:
        return True
    if one["percent"] != other["percent"]:
        # Whether "10%" means 10 or 0.1 is a matter of the problem's wording: both are accepted.
        in_percent, plain = (left, right) if one["percent"] else (right, left)
        return True if in_percent == plain * 100 else None
    both_whole = "." not in one["value"] + other["value"]
    return False if both_whole else None

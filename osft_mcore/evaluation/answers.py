"""Finding the answer in a response."""

import re
from itertools import islice

BOX = r"\boxed"

ANSWER_TAIL_CHARS = 300
"""Where the answer line is looked for: an answer comes last."""

MAX_BRACES = 10_000
"""In a box; with more it counts as not closed."""

# A class first: where neither is, the search runs at the speed of a scan.
_BRACES = re.compile(r"[\\{}](?:(?<=\\).)?", re.DOTALL)
_ANSWER_LINE = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_HASHES = re.compile(r"#### (-?[0-9.,]+)")


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, braces matched (escaped braces do not count).

    None if the last `\boxed` is not closed or has no brace: an earlier one does not stand in.
    """
    start = text.rfind(BOX)
    if start < 0 or not text.startswith("{", start + len(BOX)):
        return None
    first = start + len(BOX) + 1
    depth = 1
    for match in islice(_BRACES.finditer(text, first), MAX_BRACES):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[first : match.start()]
    return None


def last_answer_line(text: str) -> str | None:
    """What follows the last `Answer:` near the end of the text, to the end of that line."""
    found = _ANSWER_LINE.findall(text[-ANSWER_TAIL_CHARS:])
    return found[-1].strip() if found else None


def after_hashes(text: str) -> str | None:
    """The last number written as `#### 1,234`, without its commas."""
    start = text.rfind("#### ")
    while start >= 0:
        if match := _HASHES.match(text, start):
            return match[1].replace(",", "")
        start = text.rfind("#### ", 0, start)
    return None

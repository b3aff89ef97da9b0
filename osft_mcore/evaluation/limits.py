"""What is too large to be handed to computer algebra, told from its spelling alone."""

import re

MAX_ANSWER_CHARS = 2000
MAX_DIGITS_IN_A_ROW = 400
MAX_EXPONENT = 10_000
MAX_FACTORIAL = 1000
MAX_RANGE = 10_000
"""Of the numbers in sums, products and binomials."""
MAX_DEPTH = 40
MAX_ELEMENTS = 128
"""Elements of sets and cells of matrices."""
MAX_TERMS = 200

_DIGITS = re.compile(rf"\d{{{MAX_DIGITS_IN_A_ROW + 1}}}")
_EXPONENT = re.compile(r"(?:\^|\*\*)[\s{(+-]*(\d+)")
# No letter but those of commands such as \cdot: nothing holds the value small.
_NUMERIC = r"(?:[^{}()a-zA-Z\\]|\\(?:cdot|times|frac|left|right)(?![a-zA-Z]))*"
_TOWER = re.compile(
    rf"(?:\^|\*\*)\s*(?:\{{|\\left\(|\()?{_NUMERIC}[\d)}}]\s*(?:\^|\*\*)\s*[\{{(]*\d"
)
_FACTORIAL = re.compile(r"(\d+)\s*[})]*\s*(?:\\right\s*\)\s*)?!")
_FACTORIAL_OF_POWER = re.compile(rf"\^{_NUMERIC}[\s}})]*!|!{_NUMERIC}[\s}})]*!")
_RANGE = re.compile(r"\\(?:sum|prod|d?binom|tbinom|int|bigcup|bigcap)(?![a-zA-Z])")
_NUMBER = re.compile(r"\d+")
_SEPARATORS = re.compile(r"[,;&]|\\\\")
_TERMS = re.compile(r"[+\-*/]|\\(?:cdot|times|frac|sqrt)(?![a-zA-Z])")


def too_large(answer: str) -> str | None:
    """Why the answer may not be handed on; None if it may."""
    if len(answer) > MAX_ANSWER_CHARS:
        return f"{len(answer)} characters, at most {MAX_ANSWER_CHARS}"
    if _DIGITS.search(answer):
        return f"more than {MAX_DIGITS_IN_A_ROW} digits in a row"
    if _depth(answer) > MAX_DEPTH:
        return f"nested more than {MAX_DEPTH} deep"
    if len(_SEPARATORS.findall(answer)) >= MAX_ELEMENTS:
        return f"more than {MAX_ELEMENTS} elements"
    if len(_TERMS.findall(answer)) > MAX_TERMS:
        return f"more than {MAX_TERMS} terms"
    return _huge_value(answer)


def _huge_value(answer: str) -> str | None:
    if any(int(digits) > MAX_EXPONENT for digits in _EXPONENT.findall(answer)):
        return f"an exponent above {MAX_EXPONENT}"
    if _TOWER.search(answer):
        return "a tower of powers"
    if _FACTORIAL_OF_POWER.search(answer) or any(
        int(digits) > MAX_FACTORIAL for digits in _FACTORIAL.findall(answer)
    ):
        return f"a factorial of more than {MAX_FACTORIAL}"
    if _RANGE.search(answer) and any(int(digits) > MAX_RANGE for digits in _NUMBER.findall(answer)):
        return f"a sum, product or binomial with a number above {MAX_RANGE}"
    return None


def _depth(answer: str) -> int:
    depth = deepest = 0
    for character in answer:
        if character in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "})]":
            depth -= 1
    return deepest

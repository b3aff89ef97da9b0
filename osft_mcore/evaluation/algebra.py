"""Comparing two answers by algebra. Runs in grading workers only: nothing here bounds its time."""

import re
from collections.abc import Callable, Iterator

import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from osft_mcore.evaluation.formula import Expression, UnreadableError, read_formula
from osft_mcore.evaluation.spelling import normalize_answer, spellings, without_dollars

MAX_UNKNOWNS = 2
"""Letters in a difference that sympy is asked to simplify."""

FAR = sympy.Rational(1, 10**5)
"""Values this far apart are different for math-verify as well, which rounds to six places."""

_FRACTION = re.compile(r"-?(?:\d+/\d+|\\frac\{-?\d+\}\{\d+\})")
_INTEGER = re.compile(r"-?\d+")
_TUPLE = re.compile(r"([(\[])(.*)([)\]])", re.DOTALL)


class UnreadableGoldError(Exception):
    """math-verify finds nothing to compare in the gold answer."""


def stages(*, fast: bool) -> tuple[Callable[[str, str], bool | None], ...]:
    """The comparisons, the quick one first. True or False ends them; None leaves it to the next."""
    return (same_by_sympy,) if fast else (same_by_sympy, same_by_math_verify)


def same_by_sympy(answer: str, gold: str) -> bool | None:
    """Whether sympy reduces the difference to zero, element by element and in order.

    False if the two, whole as they are, have different values.
    """
    pairs = list(spellings(answer, gold))
    first = _same_tuple(*pairs[0])
    if first is not None:
        return first
    return True if any(_same_tuple(*pair) for pair in pairs[1:]) else None


def _same_tuple(answer: str, gold: str) -> bool | None:
    one, other = _TUPLE.fullmatch(answer), _TUPLE.fullmatch(gold)
    if one is None or other is None:
        return _same_element(answer, gold)
    elements, wanted = list(_elements(one[2])), list(_elements(other[2]))
    same_kind = len(wanted) == 1 or (one[1], one[3]) == (other[1], other[3])
    if len(elements) != len(wanted) or not same_kind:
        return None
    verdicts = [_same_element(*pair) for pair in zip(elements, wanted, strict=True)]
    return False if False in verdicts else None if None in verdicts else True


def _elements(text: str) -> Iterator[str]:
    depth = first = 0
    for position, character in enumerate(text):
        depth += {**dict.fromkeys("([{", 1), **dict.fromkeys(")]}", -1)}.get(character, 0)
        if character == "," and depth == 0:
            yield normalize_answer(text[first:position])
            first = position + 1
    yield normalize_answer(text[first:])


def _same_element(answer: str, gold: str) -> bool | None:
    if answer == gold:
        return True if answer else None
    if _FRACTION.fullmatch(answer) and _FRACTION.fullmatch(gold):
        # One of them is not in lowest terms.
        return None
    whole = [bool(_INTEGER.fullmatch(text)) for text in (answer, gold)]
    decimal = "." in answer or "." in gold
    try:
        verdict = _equal(read_formula(answer), read_formula(gold))
    except UnreadableError:
        return None
    # A whole number has to be worked out.
    return None if verdict and whole in ([True, False], [False, True]) and not decimal else verdict


def _equal(one: Expression, other: Expression) -> bool | None:
    difference = one - other
    unknowns = sorted(difference.free_symbols, key=str)
    if difference.has(sympy.nan, sympy.zoo):
        return None
    # Numbers first: most wrong answers never need to be simplified.
    point = {unknown: sympy.Rational(271 + 20 * k, 997 + k) for k, unknown in enumerate(unknowns)}
    value = difference.subs(point).evalf(20, maxn=200)
    if value.is_comparable and abs(value) > FAR:
        # Other letters may be the same ones for math-verify, which takes X for x.
        return False if one.free_symbols == other.free_symbols else None
    if len(unknowns) > MAX_UNKNOWNS or not value.is_number:
        return None
    return True if sympy.simplify(difference) == 0 else None


def same_by_math_verify(answer: str, gold: str) -> bool:
    """What math-verify says. Raises UnreadableGoldError."""
    expected = _expressions(gold)
    if not expected:
        raise UnreadableGoldError(f"math-verify cannot read the expected answer {gold[:200]!r}")
    return bool(verify(expected, _expressions(answer), timeout_seconds=None))


def _expressions(latex: str) -> list[object]:
    one_line = " ".join(without_dollars(latex).split())
    extraction = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    parsed: list[object] = parse(
        f"${one_line}$", extraction_config=extraction, parsing_timeout=None
    )
    return parsed

"""Finding an answer, and what its spelling alone decides."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osft_mcore.evaluation.answers import (
    MAX_BRACES,
    after_hashes,
    last_answer_line,
    last_boxed,
)
from osft_mcore.evaluation.limits import too_large
from osft_mcore.evaluation.spelling import bare_answer, same_by_spelling

# Finding the box


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{42}", "42"),
        (r"\boxed{41}, no: \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{\sqrt{2}}} and }", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{}", ""),
        ("no box", None),
        (r"\boxed 42", None),
        (r"\boxed{42", None),
        (r"\boxed{1} then \boxed{2", None),
        (r"\fbox{42}", None),
        (r"\boxed", None),
        (r"\boxed{" + "{}" * (MAX_BRACES // 2 - 1) + "}", "{}" * (MAX_BRACES // 2 - 1)),
        (r"\boxed{" + "{}" * (MAX_BRACES // 2) + "}", None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@settings(deadline=None, derandomize=True)
@given(st.text(alphabet="a1+ ,"), st.text(alphabet="ab{}\\ "), st.integers(0, 5))
def test_last_boxed_undoes_boxing(inner: str, before: str, depth: int) -> None:
    content = "{" * depth + inner + "}" * depth
    assert last_boxed(before + r" \boxed{" + content + "}") == content


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So: #### 42", "42"),
        ("#### 1 #### -1,234.50", "-1234.50"),
        ("#### 41\n#### none", "41"),
        ("####42", None),
        ("#### $42", None),
        ("42", None),
    ],
)
def test_after_hashes(text: str, answer: str | None) -> None:
    assert after_hashes(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 42", "42"),
        ("answer : $x$ \nthe end", "$x$"),
        ("ANSWER: 41\nAnswer:42", "42"),
        ("Answer: 42" + " " * 300, None),
        ("The answer is 42", None),
    ],
)
def test_last_answer_line(text: str, answer: str | None) -> None:
    assert last_answer_line(text) == answer


# Strings


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("42", "42", True),
        ("42", "43", False),
        ("-42", "42", False),
        ("\u22125", "-5", True),
        ("$42$", "42", True),
        (r"\$5", "5", True),
        ("42.", "42", True),
        ("3.0", "3", True),
        ("1.60", "1.6", True),
        (".5", "0.50", True),
        ("1,000", "1000", True),
        ("1{,}000{,}000", "1000000", True),
        ("007", "7", True),
        (r"\dfrac12", r"\frac{1}{2}", True),
        (r"-\tfrac{1}{2}", "-1/2", True),
        (r"\left( 1,\ 2 \right)", "(1,2)", True),
        (r"x \to \leftarrow", r"x\to\leftarrow", True),
        (r"\text{Evelyn}", "Evelyn", True),
        (r"10\%", "10", True),
        ("0.1", r"10\%", True),
        ("", "1", False),
        ("$ $", "1", False),
        (r"\text{ }", "1", False),
        (r"\frac{2}{4}", r"\frac{1}{2}", True),
        (r"\frac{2}{4}", r"\frac{1}{3}", False),
        ("0.5", r"-\frac{1}{2}", False),
        ("3.14", "3", False),
        (r"5 \text{ cm}", "5", True),
        (r"5\text{cm}^2", "5", True),
        ("5 cm", "5", True),
        ("1,000 miles", "1000", True),
        ("7", r"7^\circ", True),
        ("x = 3", "3", True),
        ("3", "x=3", True),
        (r"\text{(C)}", "C", True),
        ("evelyn", r"\text{Evelyn}", True),
        (r"\sqrt3", r"\sqrt{3}", True),
        ("3 and 5", "3,5", True),
        (r"42 \text{ (exactly)}", "42", True),
        # What is left out has to be left out on one side only:
        (r"5 \text{ cm}", r"5 \text{ m}", None),
        ("y=3", "x=3", None),
        # Not a unit:
        (r"5 \text{ million}", "5", None),
        (r"2\mathrm{e}", "2", None),
        ("5x", "5", None),
        ("Rr", "rr", True),
        ("2Rr", "2rr", None),
        # Not for spelling to decide:
        ("1 1/2", "11/2", None),
        ("0.3333333", "1/3", None),
        (r"20\%", "10", None),
        ("(2,1)", "(1,2)", None),
        ("x=1=2", "2", None),
        ("1/0", "1", None),
        ("9" * 5000, "8" * 5000, None),
    ],
)
def test_same_by_spelling(answer: str, gold: str, same: bool | None) -> None:
    assert same_by_spelling(answer, gold, fast=False) is same


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        (r"\frac{2}{4}", r"\frac{1}{2}", None),
        ("0.1", r"10\%", None),
        ("4/2", "2", None),
        ("0.5", r"\frac{1}{2}", True),
        (r"\dfrac12", "1/2", True),
        ("3.0", "3", True),
        ("3.1", "3", False),
    ],
)
def test_the_fast_mode_is_stricter(answer: str, gold: str, same: bool | None) -> None:
    assert same_by_spelling(answer, gold, fast=True) is same


@settings(deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_normalising_survives_any_text_and_keeps_it_equal_to_itself(text: str) -> None:
    assert same_by_spelling(text, text, fast=False) is bool(bare_answer(text))


@settings(deadline=None, derandomize=True)
@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_whole_numbers_never_need_algebra(one: int, other: int) -> None:
    assert same_by_spelling(str(one), f"{other:,}", fast=False) is (one == other)


FRACTIONS = st.builds(Fraction, st.integers(-(10**6), 10**6), st.integers(1, 10**6))


@settings(deadline=None, derandomize=True)
@given(FRACTIONS, FRACTIONS)
def test_fractions_never_need_algebra(one: Fraction, other: Fraction) -> None:
    spelled = rf"\frac{{{other.numerator}}}{{{other.denominator}}}"
    assert same_by_spelling(str(one), spelled, fast=False) is (one == other)


# Limits


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9}}",
        r"10^{10 \cdot 10^9}",
        "(9^9)!",
        r"\left(10^7\right)!",
        "2^{100000}",
        "10000!",
        "(5!)!",
        r"\binom{10000000}{5}",
        r"\sum_{k=1}^{10^8} k^{99999}",
        "(" * 41,
        "1," * 130,
        "1" * 401,
        "x" * 2001,
        "x+" * 201,
    ],
)
def test_too_large(answer: str) -> None:
    assert too_large(answer) is not None


@pytest.mark.parametrize(
    "answer",
    [
        "2^{2019}-1",
        "e^{x^{2}}",
        "e^{x^{2^{n}}}",
        "(n+1)!",
        "100!",
        r"\binom{100}{50}",
        r"\sum_{k=1}^{2020} k!",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        "1" * 400,
        "",
    ],
)
def test_not_too_large(answer: str) -> None:
    assert too_large(answer) is None

"""Ordinary answers: what models write into boxes, right and wrong, to benchmark-like questions."""

import random
from collections.abc import Callable, Sequence

Pair = tuple[str, str]
"""Answer and expected answer."""


def ordinary_pairs(count: int, seed: int) -> list[Pair]:
    """As many pairs; about half are right. Two thirds are plain numbers, as in the benchmarks."""
    draw = random.Random(seed)
    kinds: Sequence[Callable[[random.Random], Pair]] = (
        *(_integer,) * 50,
        *(_decimal,) * 8,
        *(_quantity,) * 8,
        *(_fraction,) * 14,
        *(_root,) * 6,
        *(_polynomial,) * 6,
        *(_tuple,) * 5,
        *(_set,) * 3,
    )
    return [draw.choice(kinds)(draw) for _ in range(count)]


def _other(draw: random.Random, value: int) -> int:
    """The value, or as often another one."""
    return value + draw.choice((0, draw.randint(1, 9)))


def _integer(draw: random.Random) -> Pair:
    value = draw.choice((draw.randint(0, 999), draw.randint(-50, 50), draw.randint(1000, 99999)))
    answer = _other(draw, value)
    return draw.choice((str(answer), f"{answer:,}", f"${answer}$")), str(value)


def _decimal(draw: random.Random) -> Pair:
    value = draw.randint(1, 9999)
    return f"{_other(draw, value) / 100:.2f}", f"{value / 100:g}"


def _quantity(draw: random.Random) -> Pair:
    value = draw.randint(1, 500)
    unit = draw.choice((r" \text{ cm}", r"^\circ", r"\%", " miles", r"\text{ hours}"))
    return f"{_other(draw, value)}{unit}", str(value)


def _fraction(draw: random.Random) -> Pair:
    over, under = draw.randint(1, 40), draw.randint(2, 40)
    answer = _other(draw, over)
    spelled = draw.choice((rf"\frac{{{answer}}}{{{under}}}", f"{answer}/{under}"))
    return spelled, rf"\dfrac{{{over}}}{{{under}}}"


def _root(draw: random.Random) -> Pair:
    factor, radicand = draw.randint(2, 9), draw.choice((2, 3, 5, 7, 11))
    return rf"\sqrt{{{_other(draw, factor) ** 2 * radicand}}}", rf"{factor}\sqrt{{{radicand}}}"


def _polynomial(draw: random.Random) -> Pair:
    root, factor = draw.randint(1, 9), draw.randint(2, 6)
    middle = _other(draw, factor * root + 1)
    return f"{factor}x^2 + {middle}x + {root}", f"({factor}x+1)(x+{root})"


def _tuple(draw: random.Random) -> Pair:
    left, right = draw.randint(-9, 9), draw.randint(10, 20)
    opening, closing = draw.choice(("()", "[]", ("(", "]"), ("[", ")")))
    gold = rf"\left{opening} {left}, \frac{{{right}}}{{3}} \right{closing}"
    return f"{opening}{_other(draw, left)},{right}/3{closing}", gold


def _set(draw: random.Random) -> Pair:
    one, two = draw.sample(range(30), 2)
    return rf"\{{{two},{_other(draw, one)}\}}", rf"\{{{one},{two}\}}"

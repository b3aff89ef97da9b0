"""Reading an answer as a sympy expression, without `eval` and within bounds."""

import re
from collections.abc import Callable
from typing import Any

import sympy

MAX_POWER = 10_000
MAX_POWER_DIGITS = 20_000
MAX_FACTORIAL = 1000

Expression = Any
"""A sympy expression: the library has no types."""

_TOKEN = re.compile(r"\d+(?:\.\d*)?|\.\d+|\\[a-zA-Z]+|\*\*|sqrt|pi|million|billion|[a-zA-Z]|\S")
_SKIPPED = frozenset({r"\left", r"\right", r"\displaystyle"})
_NAMES: dict[str, Expression] = {
    "pi": sympy.pi,
    r"\pi": sympy.pi,
    "e": sympy.E,
    "i": sympy.I,
    r"\infty": sympy.oo,
    "million": sympy.Integer(10**6),
    "billion": sympy.Integer(10**9),
}
_GREEK = re.compile(
    r"\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|omega)"
)
_FUNCTIONS: dict[str, Callable[[Expression], Expression]] = {
    r"\sin": sympy.sin,
    r"\cos": sympy.cos,
    r"\tan": sympy.tan,
    r"\ln": sympy.log,
    r"\log": sympy.log,
    r"\exp": sympy.exp,
}
_TIMES = frozenset({"*", r"\cdot", r"\times", "\N{MULTIPLICATION SIGN}", "\N{MIDDLE DOT}"})
_OVER = frozenset({"/", r"\div", "\N{DIVISION SIGN}"})
_CLOSING = {"(": ")", "{": "}", "[": "]"}


class UnreadableError(Exception):
    """Not a formula of the kind that is read here."""


def read_formula(text: str) -> Expression:
    """The expression; raises UnreadableError. Decimals are exact fractions."""
    reader = _Reader([token for token in _TOKEN.findall(text) if token not in _SKIPPED])
    expression = reader.sum()
    if reader.peek() is not None:
        raise UnreadableError(f"{reader.peek()!r} was not expected")
    return expression


class _Reader:
    """Recursive descent over tokens; depth is bounded by `limits.too_large`."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._next = 0

    def peek(self) -> str | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if token is None or expected not in (None, token):
            raise UnreadableError(f"found {token!r}, expected {expected or 'more'!r}")
        self._next += 1
        return token

    def sum(self) -> Expression:
        total = self.product()
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            total = total + sign * self.product()
        return total

    def product(self) -> Expression:
        total = self.signed()
        while (token := self.peek()) is not None and token not in (*"+-)}],=", *_SKIPPED):
            if token in _TIMES:
                self.take()
                total = total * self.signed()
            elif token in _OVER:
                self.take()
                total = total / _nonzero(self.signed())
            elif token == r"\frac" and self._tokens[self._next - 1].isdigit():
                # 1\frac{1}{2} is a mixed number.
                total = total + self.power()
            elif token[0].isdigit() or token[0] == ".":
                raise UnreadableError("a number beside another factor")
            else:
                total = total * self.power()
        return total

    def signed(self) -> Expression:
        if self.peek() in ("+", "-"):
            return self.signed() if self.take() == "+" else -self.signed()
        return self.power()

    def power(self) -> Expression:
        base = self.atom()
        if self.peek() == "!":
            self.take()
            if not (base.is_Integer and 0 <= base <= MAX_FACTORIAL):
                raise UnreadableError("a factorial of this")
            base = sympy.factorial(base)
        if self.peek() in ("^", "**"):
            self.take()
            # In LaTeX 2^10 is 2^1 times 0, but nobody means that.
            exponent = self.signed()
            return _bounded_power(base, exponent)
        return base

    def atom(self) -> Expression:
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            return sympy.Rational(token)
        if token in _CLOSING:
            inner = self.sum()
            self.take(_CLOSING[token])
            return inner
        if token == r"\frac":
            return self.argument() / _nonzero(self.argument())
        if token in (r"\sqrt", "sqrt"):
            return self.root()
        if token in _NAMES:
            return _NAMES[token]
        if token in _FUNCTIONS and self.peek() in ("(", "{"):
            return _FUNCTIONS[token](self.atom())
        if (len(token) == 1 and token.isascii() and token.isalpha()) or _GREEK.fullmatch(token):
            return sympy.Symbol(token)
        raise UnreadableError(f"{token!r} was not expected")

    def argument(self) -> Expression:
        if self.peek() != "{":
            raise UnreadableError("a fraction without braces")
        return self.atom()

    def root(self) -> Expression:
        degree = sympy.Integer(2)
        if self.peek() == "[":
            degree = self.atom()
        if self.peek() not in ("{", "("):
            raise UnreadableError("a root without braces")
        return _bounded_power(self.atom(), 1 / _nonzero(degree))


def _nonzero(expression: Expression) -> Expression:
    if expression == 0:
        raise UnreadableError("a division by zero")
    return expression


def _bounded_power(base: Expression, exponent: Expression) -> Expression:
    if base == 0 and not exponent.is_positive:
        raise UnreadableError("zero to this power")
    if exponent.is_Rational:
        if abs(exponent.p) > MAX_POWER or exponent.q > MAX_POWER:
            raise UnreadableError("a large exponent")
        bits = max(int(base.p).bit_length(), int(base.q).bit_length()) if base.is_Rational else 1
        if abs(exponent.p) * bits > 4 * MAX_POWER_DIGITS:
            raise UnreadableError("a large power")
    elif exponent.is_number and base.is_number and not exponent.is_real:
        raise UnreadableError("a complex exponent")
    return base**exponent

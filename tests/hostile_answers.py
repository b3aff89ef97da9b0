"""Boxed answers made to hang, exhaust or mislead a grader. None of them is right."""

GOLD = "x+17"

HOSTILE: dict[str, str] = {
    # Values too large to be worked out
    "power tower": "9^{9^{9^9}}",
    "tower of parentheses": "((((9^9)^9)^9)^9)^9",
    "tower with stars": "9**9**9**9",
    "huge power": "10^{10^9}",
    "huge power in parentheses": "10^(10^9)",
    "huge plain exponent": "2^{99999999999}",
    "many large powers": "+".join(f"{n}^{{9999}}" for n in range(2, 150)),
    "huge root": r"\sqrt[99999999]{2^{9999}+1}",
    "factorial of a power": "(10^7)!",
    "large factorial": "99999999!",
    "factorial of a factorial": "((9!)!)!",
    "factorials in a fraction": r"\frac{100000!}{99999!}",
    "binomial": r"\binom{10000000}{5000000}",
    "long sum": r"\sum_{k=1}^{100000000} \frac{1}{k^2}",
    "long product": r"\prod_{k=1}^{100000000} k",
    "sum without an end": r"\sum_{k=1}^{\infty} \sin(k^{k})",
    "integral": r"\int_0^1 \sin(\sin(\sin(\sin(x^{x^{x}})))) dx",
    "limit": r"\lim_{n \to \infty} (1+\frac{1}{n})^{n^{n^{n}}}",
    "expansion": "(a+b+c+d+f)^{60}",
    "expansion of two": "(a+b+1)^{900}-(b+a+1)^{899}",
    "modulus": r"7^{10^{100}} \bmod 13",
    "nested functions": r"\sin(" * 35 + "x" + ")" * 35,
    "nested logarithms": r"\log_{2}(" * 30 + "99" + ")" * 30,
    # Shapes too large to be read
    "3,000 nested parentheses": "(" * 3000 + "1" + ")" * 3000,
    "900 nested parentheses": "(" * 900 + "1" + ")" * 900,
    "900 open parentheses": "(" * 900,
    "400 nested fractions": r"\frac{1}{" * 400 + "2" + "}" * 400,
    "38 nested fractions": r"\frac{x}{1+" * 38 + "2" + "}" * 38,
    "38 nested roots": r"\sqrt{x+" * 38 + "2" + "}" * 38,
    "3,000 terms": "+".join(f"x^{n}" for n in range(3000)),
    "190 terms": "+".join(f"a_{n}" for n in range(190)),
    "300-element set": r"\{" + ",".join(map(str, range(300))) + r"\}",
    "120-element set of roots": r"\{" + ",".join(rf"\sqrt{{{n}}}" for n in range(2, 122)) + r"\}",
    "huge matrix": r"\begin{pmatrix}" + r"1&2&3\\" * 500 + r"\end{pmatrix}",
    "matrix power": r"\begin{pmatrix}1&x&2\\3&4&x\\x&6&7\end{pmatrix}^{999}",
    "relations": "<".join("xyz" * 40),
    "products of letters": "abcdefghijklmnopqrstuvwxyz" * 70,
    "unions": r"\cup".join(f"({n},{n + 1})" for n in range(60)),
    # Texts too large to be held
    "5 million digits": "7" * 5_000_000,
    "digits below the cap": "7" * 1990,
    "5 million letters": "x" * 5_000_000,
    "spaces": "x" + " " * 1900 + "y",
    "backslashes": "\\\\" * 900,
    "carets": "x" + "^" * 1900,
    "dots": "1" + "." * 1900,
    # Texts that are none
    "null bytes": "1\x00+\x001",
    "lone surrogates": "\ud800\udfff x+1",
    "bytes that are not UTF-8": b"x+1\xff\xfe\xc0".decode("utf-8", "surrogateescape"),
    "replacement characters": "\ufffd" * 50,
    "astral characters": "\U0001f600" * 1900,
    "control characters": "\r\n\x0b\x1b[2J\u2028{1}",
    "right to left": "\u202e71+x",
    "foreign digits": "\u0661\u0666 + x",
    # Texts that are programs
    "python": "__import__('os').system('kill -9 -1')",
    "python attribute": "x.__class__.__base__.__subclasses__()",
    "lambda": "(lambda f: f(f))(lambda f: f(f))",
    "file": r"\input{/etc/passwd}",
    "definition": r"\def\a{\a\a}\a",
    # Texts that would please a lazy grader
    "empty": "",
    "every number": ",".join(map(str, range(100))),
    "or": r"x+16 \text{ or } x+17",
    "not": r"\neq x+17",
    "no box around it": r"x+16 \text{, not } x+17",
    "true": r"\text{True}",
    "not a number": r"\frac{0}{0}",
    "infinity minus itself": r"x+17+\infty-\infty",
    "a letter for all": "?",
    "everything": r"\mathbb{R}",
}
"""What stands in the box, by what it tries. GOLD is the right answer."""

RESPONSES: dict[str, str] = {
    "20,000 boxes": r"\boxed{x+17}" * 20_000 + r"\boxed{1}",
    "20,000 open boxes": r"\boxed{" * 20_000,
    "20,000 nested boxes": r"\boxed{" * 20_000 + "1" + "}" * 20_000,
    "5 million open braces": r"\boxed{" + "{" * 5_000_000,
    "5 million hashes": "#### " * 1_000_000,
    "nothing": "",
}
"""Whole responses."""


def responses() -> dict[str, str]:
    """Every hostile response by name."""
    return {name: rf"So it is \boxed{{{text}}}." for name, text in HOSTILE.items()} | RESPONSES

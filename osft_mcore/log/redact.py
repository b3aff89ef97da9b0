"""Leaves secrets out of what is shown or sent: by name, and by how a value looks; pure."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from osft_mcore.errors import ConfigError

HIDDEN: Final = "[redacted]"
_SECRET_WORDS: Final = frozenset(
    ("password", "passwd", "passphrase", "pwd", "secret", "secrets", "token", "tokens", "key")
) | frozenset(
    ("keys", "apikey", "authtoken", "accesskey", "secretkey", "privatekey", "credential")
) | frozenset(("credentials", "auth", "authorization", "bearer", "cookie"))  # fmt: skip
_COLUMNS: Final = ("prompt_key", "response_key")
"""Options that name columns of a file."""
_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_NAME: Final = (
    r"[\w.-]*(?:pass(?:word|wd|phrase)|pwd|secret|token|credential|cookie|api_?key|[_-]key)"
)
_NOT_A_COLUMN: Final = "".join(f"(?<!{column})" for column in _COLUMNS)
_LOOKS: Final = (
    # A user and a password in a URL.
    (re.compile(r"(?<=://)[^/\s@]+(?=@)"), HIDDEN),
    # --some-token=x, SOME_KEY=x, ?token=x; the name must end there, as max_tokens=x does not.
    (
        re.compile(rf"(?i)((?:^|(?<=[\s?&;'\"+-])){_NAME}{_NOT_A_COLUMN}\s*[=:]\s*)[^\s&;'\"]+"),
        rf"\1{HIDDEN}",
    ),
    (re.compile(rf"(?i)(--?{_NAME}{_NOT_A_COLUMN}\s+)[^\s-]\S*"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\b((?:bearer|basic)\s+)[\w.~+/=-]{8,}"), rf"\1{HIDDEN}"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*", re.DOTALL), HIDDEN),
    # As the services that hand them out write them.
    (
        re.compile(
            r"(?<![A-Za-z0-9])(?:(?:sk|pk|rk)[-_][\w-]{16,}|hf_[A-Za-z0-9]{16,}|gh[a-z]_[A-Za-z0-9]{16,}"
            r"|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16}"
            r"|AIza[\w-]{30,}|wandb_v\d_\w{16,}|eyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?)"
        ),
        HIDDEN,
    ),
    # 40 hexadecimal digits, as keys of wandb are; a part of a path is a commit.
    (re.compile(r"(?<![\w/.-])[0-9a-fA-F]{40}(?![\w/.-])"), HIDDEN),
    # Long, and no word: small and large letters and digits mixed.
    (
        re.compile(
            r"(?<![A-Za-z0-9])(?=[A-Za-z0-9]*[a-z])(?=[A-Za-z0-9]*[A-Z])(?=(?:[A-Za-z]*[0-9]){3})"
            r"[A-Za-z0-9]{32,}(?![A-Za-z0-9])"
        ),
        HIDDEN,
    ),
)

_SURE: Final = re.compile(
    # A password in a URL, or what services hand out: nothing else looks so.
    r"(?<=://)[^/\s@]+(?=@)|-----BEGIN [A-Z ]*PRIVATE KEY-----.*|(?<![A-Za-z0-9])"
    r"(?:sk[-_](?=[\w-]*\d)[\w-]{20,}|hf_[A-Za-z0-9]{30,}|gh[a-z]_[A-Za-z0-9]{30,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[a-z]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|AIza[\w-]{30,}|wandb_v\d_\w{16,}|eyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?)",
    re.DOTALL,
)
_NO_SECRET: Final = (
    "{}: found what looks like a password or a token, or the value of a variable named like one; "
    "expected none, because options are written to files: leave it in the environment "
    "(WANDB_API_KEY, HF_TOKEN)"
)
_SHORTEST: Final = 8
"""A shorter value of a variable is a word, a number or a switch."""
_SURE_NAME: Final = re.compile(
    r"(?i)pass(?:word|wd|phrase)|(?<!ask)(?<!by)(?<!com)pass$|secret|token(?!iz)"
    r"|(?:api|access|private)_?key"
)
"""In a variable's name, also within a word: PGPASSWORD, HFTOKEN. Whatever its value looks like."""
_OF_A_PLACE: Final = re.compile(r"(?i)(?:file|path|dir|sock)$")
_PLACE_OR_TEXT: Final = re.compile(r"^[/~.]|\s")


def redacted(value: Any, name: str = "") -> Any:
    """Plain values of any depth without what looks like a secret; `name` is that of `value`."""
    if isinstance(value, Mapping):
        return {redacted_text(str(key)): redacted(item, str(key)) for key, item in value.items()}
    if is_secret(name) and holds_text(value, name):
        return HIDDEN
    if isinstance(value, str):
        return redacted_text(value)
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value


def redacted_text(text: str) -> str:
    """A text without the parts that look like a secret."""
    for pattern, instead in _LOOKS:
        text = pattern.sub(instead, text)
    return text


def redacted_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line; what follows an argument such as --token is hidden, too."""
    return list(_without_secrets(arguments))


def environment_secrets(variables: Mapping[str, str]) -> tuple[str, ...]:
    """Values of the variables that are named like secrets; not places, as SSH_AUTH_SOCK has one."""
    return tuple(
        value
        for name, value in variables.items()
        if len(value) >= _SHORTEST
        and not _OF_A_PLACE.search(name)
        and (_SURE_NAME.search(name) or (is_secret(name) and not _PLACE_OR_TEXT.search(value)))
    )


def without_secrets(text: str, secrets: Sequence[str] = ()) -> str:
    """A text without `secrets`, and without what can be nothing else: all other text stays."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return _SURE.sub(HIDDEN, text)


def options_with_secrets(options: Any, secrets: Sequence[str], name: str = "") -> list[str]:
    """Problems, in words: options are written into the run's files, and go to trackers."""
    if isinstance(options, Mapping):
        items = [(f"{name}.{key}".lstrip("."), value) for key, value in options.items()]
    elif isinstance(options, list | tuple):
        items = [(name, value) for value in options]
    else:
        held = isinstance(options, str) and without_secrets(options, secrets) != options
        return [_NO_SECRET.format(name)] if held else []
    return [
        problem for key, value in items for problem in options_with_secrets(value, secrets, key)
    ]


def check_options(
    options: Mapping[str, Any], secrets: Sequence[str], sound: Callable[[], None]
) -> None:
    """Raise one ConfigError for options that hold a secret, and for all that `sound` finds."""
    problems = options_with_secrets(options, secrets)
    try:
        sound()
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)


def is_secret(name: str) -> bool:
    """True for the name of a password, a key or a token."""
    words = [word.lower() for word in _WORD.findall(name)]
    return name not in _COLUMNS and bool(_SECRET_WORDS & set(words))


def holds_text(value: Any, name: str) -> bool:
    """True if a value of that name can be a secret: max_tokens is a number, a password may be."""
    if isinstance(value, bool) or value is None or value in ("", [], ()):
        return False
    if isinstance(value, int | float):
        return "pass" in name.lower() or "pwd" in name.lower() or "secret" in name.lower()
    return True


def _without_secrets(arguments: Sequence[str]) -> Iterator[str]:
    hide = False
    for text in arguments:
        name, _, value = text.partition("=")
        if hide and not text.startswith("-"):
            yield HIDDEN
        elif value and name.split(".")[-1] not in _COLUMNS and is_secret(name.split(".")[-1]):
            number = _number(value)
            yield (
                text if number is not None and not holds_text(number, name) else f"{name}={HIDDEN}"
            )
        else:
            yield redacted_text(text)
        hide = text.startswith("-") and not value and is_secret(text)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

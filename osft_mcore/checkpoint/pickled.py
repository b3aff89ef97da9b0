"""A pickle read as data: no class is imported and nothing is called.

Loading a pickle runs what its author wants. Here its opcodes are followed by a machine that knows
numbers, strings, tuples, lists, dicts and names of classes, and that has no way to call anything.
An Unpickler with an allow-list would not do: a deeply nested tuple as a key of a dict overflows its
stack, and nine bytes make it allocate gigabytes.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Name:
    """What would have been imported."""

    module: str
    name: str


@dataclass(eq=False, slots=True)
class Record:
    """What would have been an object: its class, and what that would have been given."""

    name: Name
    args: tuple[Any, ...]
    state: Any = None


Names = Mapping[str, frozenset[str]]
"""Module -> names in it."""

_LITERALS: Final = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}) | frozenset(
    {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
)
_CONSTANTS: Final = MappingProxyType(
    {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
)
_TUPLES: Final = MappingProxyType({"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3})


def read_pickled(content: bytes, names: Names) -> Any:
    """The value of a pickle that mentions only `names`; its objects become `Record`s.

    Raises ValueError, with what was found, for anything else that a pickle may be or hold.
    """
    machine = _Machine(names)
    try:
        for opcode, argument, _position in pickletools.genops(content):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"a damaged pickle ({type(error).__name__})") from error
    raise ValueError("a pickle without an end")


class _Machine:
    """The stack and the memo that the opcodes of a pickle work on."""

    def __init__(self, names: Names) -> None:
        self.stack: list[Any] = []
        self._names = names
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._steps: dict[str, Callable[[Any], None]] = {
            "PROTO": self._nothing,
            "FRAME": self._nothing,
            "MARK": self._mark,
            "TUPLE": self._tuple,
            "EMPTY_LIST": lambda _: self.stack.append([]),
            "EMPTY_DICT": lambda _: self.stack.append({}),
            "APPEND": lambda _: self._extend([self.stack.pop()]),
            "APPENDS": lambda _: self._extend(self._since_mark()),
            "SETITEM": lambda _: self._update([self.stack.pop(-2), self.stack.pop()]),
            "SETITEMS": lambda _: self._update(self._since_mark()),
            "MEMOIZE": lambda _: self._remember(len(self._memo)),
            "BINPUT": self._remember,
            "LONG_BINPUT": self._remember,
            "BINGET": lambda place: self.stack.append(self._memo[place]),
            "LONG_BINGET": lambda place: self.stack.append(self._memo[place]),
            "GLOBAL": lambda name: self._name(*str(name).split(" ", 1)),
            "STACK_GLOBAL": lambda _: self._name(self.stack.pop(-2), self.stack.pop()),
            "NEWOBJ": self._record,
            "REDUCE": self._record,
            "BUILD": self._build,
        }

    def step(self, opcode: str, argument: Any) -> None:
        """Follow one opcode."""
        if opcode in _LITERALS:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode])
        elif opcode in _TUPLES:
            length = _TUPLES[opcode]
            parts = [self.stack.pop() for _ in range(length)]
            self.stack.append(tuple(reversed(parts)))
        elif opcode in self._steps:
            self._steps[opcode](argument)
        else:
            raise ValueError(f"the pickle opcode {opcode}, which has no use here")

    def _nothing(self, _argument: Any) -> None:
        """Protocol and framing say nothing about the value."""

    def _mark(self, _argument: Any) -> None:
        self._below.append(self.stack)
        self.stack = []

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._below.pop()
        return items

    def _tuple(self, _argument: Any) -> None:
        items = self._since_mark()
        self.stack.append(tuple(items))

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("a pickle that appends to something other than a list")
        self.stack[-1].extend(items)

    def _update(self, items: list[Any]) -> None:
        keys = items[::2]
        # Nothing else is hashed: hashing a deeply nested tuple overflows the stack.
        if not isinstance(self.stack[-1], dict) or not all(
            isinstance(key, str | int | Record) for key in keys
        ):
            raise ValueError("a pickle with a dict whose keys are not strings or records")
        self.stack[-1].update(zip(keys, items[1::2], strict=True))

    def _remember(self, place: int) -> None:
        self._memo[place] = self.stack[-1]

    def _name(self, module: Any, name: Any) -> None:
        known = isinstance(module, str) and isinstance(name, str)
        if not known or name not in self._names.get(module, ()):
            wanted = f"{module}.{name}" if known else "something without a name"
            raise ValueError(f"a wish to import {wanted[:200]!r}, which it has no use for")
        self.stack.append(Name(module, name))

    def _record(self, _argument: Any) -> None:
        name, args = self.stack.pop(-2), self.stack.pop()
        if not isinstance(name, Name) or not isinstance(args, tuple):
            raise ValueError("a pickle that calls something other than a class")
        self.stack.append(Record(name, args))

    def _build(self, _argument: Any) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Record):
            raise ValueError("a pickle that sets the state of something other than an object")
        self.stack[-1].state = state

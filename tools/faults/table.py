"""The faults as a table in a document, between two marks."""

from collections.abc import Sequence
from pathlib import Path

from faults.cells import Cell

BEGIN, END = "<!-- fault matrix -->", "<!-- end of fault matrix -->"


def as_table(cells: Sequence[Cell], *, deadline_s: float) -> str:
    """Markdown, a line a cell."""
    lines = [
        f"Every phase had a deadline of {deadline_s:g} s.",
        "",
        "| launcher | layout | phase | rank | fault | run ended after | exit code | "
        "what the run said |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {c.launcher} | {c.layout} | {c.phase} | {c.rank} | {c.fault} | {c.seconds:.1f} s | "
        f"{'none' if c.code is None else c.code} | {_said(c)} |"
        for c in cells
    ]
    return "\n".join(lines) + "\n"


def _said(cell: Cell) -> str:
    said = cell.told or "nothing"
    return f"{said}; **broken: {cell.problem}**" if cell.problem else said


def write_table(document: Path, table: str) -> None:
    """Replace what is between the marks. Raises ValueError if they are not there."""
    text = document.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document}: expected {BEGIN} and {END} in it")
    document.write_text(f"{before}{begin}\n\n{table}\n{end}{after}", encoding="utf-8")

"""What tools/clean_traces.py does: a file of traces becomes a training set and a report."""

from pathlib import Path
from typing import Literal

from data_preparation.sources import read_rows
from data_preparation.traces import Cleaned, clean_traces
from data_preparation.write import output_report, trace_table, write_parquet, write_report
from osft_mcore.errors import ConfigError, DataError
from osft_mcore.files import record_of
from osft_mcore.log.console import Console


def convert_traces(
    traces: Path, out: Path, *, wrong: Literal["drop", "keep"], force: bool, console: Console
) -> None:
    """Clean a file of traces. Raises ConfigError or DataError; nothing is written then."""
    report = out.with_suffix(".json")
    problems = []
    if not traces.is_file():
        problems.append(f"no such file: {traces}")
    elif traces.suffix != ".jsonl":
        problems.append(f"{traces}: expected a .jsonl file, one trace a line")
    if out.suffix != ".parquet":
        problems.append(f"{out}: expected a name that ends in .parquet")
    elif not force:
        problems += [
            f"{path} exists; name another file, or replace it with --force"
            for path in (out, report)
            if path.exists()
        ]
    if problems:
        raise ConfigError(problems)
    cleaned = clean_traces(read_rows(traces, ()), wrong=wrong)
    if not cleaned.rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in cleaned.dropped.items())
        raise DataError(
            f"{traces}: none of {cleaned.num_read} traces is left ({reasons or 'no lines'}); "
            "expected lines with question, reasoning, and final_number or final"
        )
    table, source = trace_table(cleaned.rows), record_of(traces)
    record = write_parquet(out, table)
    write_report(
        report,
        {
            "options": {"wrong": wrong},
            "source": {"name": traces.name, "size": source.size, "sha256": source.sha256},
            "traces_read": cleaned.num_read,
            "kept": len(cleaned.rows),
            "dropped": dict(sorted(cleaned.dropped.items())),
            "changed": dict(sorted(cleaned.changed.items())),
            "outputs": {out.name: output_report(table, record)},
        },
    )
    console.table("traces", ["traces", "count"], _counts(cleaned))
    console.say(f"written: {out}, {report}")
    console.say(f"train on it with: osft sft data.train={out}")


def _counts(cleaned: Cleaned) -> list[list[str]]:
    return [
        ["traces read", str(cleaned.num_read)],
        *([f"  dropped: {why}", str(count)] for why, count in sorted(cleaned.dropped.items())),
        ["kept", str(len(cleaned.rows))],
        *([f"  {what}", str(count)] for what, count in sorted(cleaned.changed.items())),
    ]

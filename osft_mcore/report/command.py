"""`osft report`: the page about run folders, or a replay of their metrics into a tracker."""

# torch is not imported, and numpy only once there is something to compute.

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from osft_mcore.errors import ConfigError
from osft_mcore.files import rename, write_file
from osft_mcore.log.run_folder import REPORT
from osft_mcore.log.trackers import TRACKERS

HELP: Final = "an HTML page about one run or several, or a replay of their metrics"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `osft report` takes."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    where = f"default: RUN/{REPORT}; {REPORT} here, of several runs"
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the page to write ({where})")
    parser.add_argument(
        "--samples", type=int, default=0, metavar="N", help="also show N answers of each kind"
    )
    parser.add_argument(
        "--sync", choices=TRACKERS, help="write no page, but send all metrics to this tracker"
    )


def run_report(arguments: argparse.Namespace) -> None:
    """Write the page, or send the metrics. Raises ConfigError if a folder is no run."""
    if arguments.samples < 0:
        raise ConfigError(f"--samples: found {arguments.samples}, expected 0 or more")
    if arguments.sync is not None and (arguments.out is not None or arguments.samples):
        raise ConfigError(
            "--sync: found it with --out or --samples, which are for the page; it writes none"
        )
    from osft_mcore.report.run import read_runs

    runs = read_runs(arguments.runs)
    if arguments.sync is not None:
        from osft_mcore.report.replay import replay

        for run in runs:
            sys.stdout.write(f"{replay(run, arguments.sync)}\n")
        return
    from osft_mcore.report.page import page

    out: Path | None = arguments.out
    if out is None:
        out = runs[0].path / REPORT if len(runs) == 1 else Path(REPORT)
    write_page(out, page(runs, num_samples=arguments.samples))
    sys.stdout.write(f"written: {out}\n")


def temporary_file(out: Path, pid: int) -> Path:
    """What a process writes before it replaces `out`.

    Of its own: a report that a user asks for and one of the run may be under way at once.
    """
    return out.with_name(f".{out.name}.{pid}.tmp")


def write_page(out: Path, text: str) -> None:
    """In one step. Raises ConfigError if it cannot be written."""
    temporary = temporary_file(out, os.getpid())
    try:
        # A text from a model may hold half a surrogate pair, which no file can.
        write_file(temporary, [text.encode("utf-8", "replace")])
        rename(temporary, out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"--out: {str(out)!r} cannot be written: {error.strerror}") from error


def main(argv: Sequence[str]) -> None:
    """For a process that a run starts: the arguments of `osft report`, and errors raised."""
    parser = argparse.ArgumentParser(prog="osft report", description=HELP)
    add_arguments(parser)
    run_report(parser.parse_args(argv))

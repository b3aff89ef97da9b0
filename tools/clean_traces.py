"""Make a training set for `osft sft` of a teacher's reasoning traces."""

import argparse
import sys
from pathlib import Path

from data_preparation.trace_command import convert_traces

from osft_mcore.errors import ConfigError, OsftError
from osft_mcore.log.console import Console


def main() -> int:
    """Parse the command line, clean, say what became of the traces."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "traces",
        type=Path,
        metavar="IN.jsonl",
        help="a trace a line: question, reasoning, final_number or final, correct, id",
    )
    parser.add_argument("out", type=Path, metavar="OUT.parquet", help="file to write")
    parser.add_argument(
        "--wrong",
        choices=("drop", "keep"),
        default="drop",
        help="what to do with traces whose field `correct` is false (drop)",
    )
    parser.add_argument("--force", action="store_true", help="replace what is there")
    args = parser.parse_args()
    try:
        convert_traces(
            args.traces, args.out, wrong=args.wrong, force=args.force, console=Console(enabled=True)
        )
    except OsftError as error:
        lines = error.problems if isinstance(error, ConfigError) else [str(error)]
        sys.stderr.write("".join(f"clean_traces: {line}\n" for line in lines))
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"clean_traces: {args.out}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

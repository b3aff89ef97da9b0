"""Bring public data sets into the columns that osft reads, from the hub or from a local copy."""

import argparse
import sys
from pathlib import Path

from data_preparation.catalog import DATA_SETS
from data_preparation.command import Request, prepare
from data_preparation.convert import Options
from data_preparation.hub import fetch_if_installed

from osft_mcore.errors import ConfigError, OsftError
from osft_mcore.log.console import Console


def _request() -> Request:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(DATA_SETS))
    parser.add_argument(
        "--from",
        dest="local",
        type=Path,
        metavar="PATH",
        help="a local copy instead of the hub: a parquet, jsonl, json or csv file, or a folder",
    )
    parser.add_argument("--revision", help="of the hub's data set; the newest")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder (data)")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.add_argument("--system", default="", help="a system turn to put before every question")
    parser.add_argument("--suffix", default="", help="text to append to every question")
    parser.add_argument(
        "--validation-rows", type=int, default=512, help="of gsm8k's train split (512)"
    )
    parser.add_argument("--seed", type=int, default=1, help="draws them (1)")
    args = parser.parse_args()
    return Request(
        names=tuple(args.names),
        local=args.local,
        revision=args.revision,
        out=args.out,
        force=args.force,
        options=Options(
            system=args.system,
            suffix=args.suffix,
            validation_rows=args.validation_rows,
            seed=args.seed,
        ),
    )


def main() -> int:
    """Parse the command line, prepare, say what became of the rows."""
    try:
        prepare(_request(), Console(enabled=True), fetch_if_installed())
    except OsftError as error:
        lines = error.problems if isinstance(error, ConfigError) else str(error).splitlines()
        sys.stderr.write("".join(f"prepare_data: {line}\n" for line in lines))
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"prepare_data: --out: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

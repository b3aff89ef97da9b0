"""Make a training set for `osft sft` of the answers that `osft generate` wrote."""

import argparse
import sys
from pathlib import Path

from osft_mcore.data.solutions import convert_solutions
from osft_mcore.errors import ConfigError, OsftError
from osft_mcore.log.console import Console


def main() -> int:
    """Parse the command line, convert, print what became of the answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--solutions", type=Path, required=True, help="a solutions.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="parquet file to write")
    parser.add_argument(
        "--truncated",
        choices=("drop", "keep"),
        required=True,
        help="what to do with answers that were cut off; kept, they teach no end",
    )
    parser.add_argument(
        "--val-share", type=float, default=0.0, help="share of the prompts to put into OUT_val"
    )
    parser.add_argument("--seed", type=int, default=1, help="draws them")
    args = parser.parse_args()
    try:
        done = convert_solutions(
            args.solutions,
            args.out,
            truncated=args.truncated,
            val_share=args.val_share,
            seed=args.seed,
        )
    except OsftError as error:
        lines = error.problems if isinstance(error, ConfigError) else [str(error)]
        sys.stderr.write("".join(f"solutions_to_sft: {line}\n" for line in lines))
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"solutions_to_sft: --out: {error}\n")
        return 1
    console = Console(enabled=True)
    console.table("solutions", ["answers", "count"], done.table())
    console.say(f"written: {args.out}")
    console.say(
        "train on it with data.prompt_key=prompt_token_ids data.response_key=response_token_ids"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time the weight push against the usual way: gather whole parameters, let vLLM cut them.

Starts 2 and 4 ranks on this machine with random models; needs no weights and no GPU.
"""

import argparse
import json
import os
import sys

# Before torch is imported: ranks that compete for cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# vLLM's CPU build warns about the memory binding of every rank.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from sync_benchmark.cases import DEFAULT_LAYOUTS, LAYOUTS, MODELS, make_cases
from sync_benchmark.quiet import silence_libraries


def main() -> int:
    """Parse the command line, measure every case, print the table."""
    args = _parser().parse_args()
    cases = make_cases(
        args.models,
        args.layouts,
        mode=args.mode,
        verify=args.verify,
        dtype=args.dtype,
        bucket_mib=args.bucket_mib,
        rounds=args.rounds,
    )
    silence_libraries()
    # Late, because importing vLLM takes seconds that --help should not.
    from sync_benchmark.place import machine
    from sync_benchmark.ranks import run_case
    from sync_benchmark.rows import as_json, table_head, table_line

    if args.json:
        print(json.dumps([as_json(run_case(case)) for case in cases], indent=2))
        return 0
    rounds = "/".join(str(number) for number in dict.fromkeys(case.rounds for case in cases))
    options = f"{args.dtype}; sync.mode={args.mode} sync.verify={args.verify}; {rounds} rounds"
    print(f"{machine()}; {options}\n{table_head()}", flush=True)
    for case in cases:
        print(table_line(run_case(case)), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, known, usual in (
        ("models", MODELS, list(MODELS)),
        ("layouts", LAYOUTS, list(DEFAULT_LAYOUTS)),
    ):
        what = f"of {', '.join(known)}; default: {', '.join(usual)}"
        parser.add_argument(
            f"--{name}", nargs="+", choices=known, default=usual, metavar="NAME", help=what
        )
    # Not alias: here actor and engine pad the vocabulary differently, as they mostly do. Not
    # reload: it is a usual way itself, for engines that nothing else can write to.
    modes = ("copy", "auto")
    parser.add_argument("--mode", choices=modes, default="copy", help="sync.mode, default copy")
    levels = ("off", "sample", "full")
    parser.add_argument("--verify", choices=levels, default="sample", help="default sample")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="default bf16")
    parser.add_argument("--bucket-mib", type=int, help="default 64 for 200M, 4 for 20M")
    parser.add_argument("--rounds", type=int, help="timed pushes of each way; default 5 and 7")
    parser.add_argument("--json", action="store_true", help="print a JSON list of the rows")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Time and weigh the loss without logits in memory against losses of whole logits.

Starts 1 and 2 ranks on this machine with random inputs; needs no weights and no GPU.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict

# Before torch is imported: ranks that compete for cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from loss_benchmark.cases import BASELINES, MORE_HIDDEN, MORE_TOKENS, VOCAB, left_out, make_cases
from sync_benchmark.quiet import silence_libraries


def main() -> int:
    """Parse the command line, measure every case, print the table."""
    parser = _parser()
    args = parser.parse_args()
    try:
        cases = make_cases(
            tokens=args.tokens,
            hidden=args.hidden,
            tps=args.tp,
            vocab=args.vocab,
            dtype=args.dtype,
            rounds=args.rounds,
            baselines=args.baselines,
            full=args.full,
        )
    except ValueError as error:
        parser.error(str(error))
    silence_libraries()
    # Late, because importing Megatron-Core takes seconds that --help should not.
    from loss_benchmark.rows import growth_lines, run_case, table_head, table_line
    from sync_benchmark.place import machine

    print(*left_out(args.tp), sep="\n", file=sys.stderr)
    if args.json:
        print(json.dumps([asdict(row) for case in cases for row in run_case(case)], indent=2))
        return 0
    print(f"{machine()}; {cases[0].dtype}, vocabulary {args.vocab}\n{table_head()}", flush=True)
    rows = []
    for case in cases:
        rows += (found := run_case(case))
        print("\n".join(map(table_line, found)), flush=True)
    print(*growth_lines(rows), sep="\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    more = {"tokens": MORE_TOKENS, "hidden": MORE_HIDDEN}
    for name, sizes in more.items():
        usual = f"default of {', '.join(map(str, sizes))} what the device does in minutes"
        parser.add_argument(f"--{name}", nargs="+", type=int, metavar="N", help=usual)
    parser.add_argument("--tp", nargs="+", type=int, default=[1, 2], metavar="N", help="ranks")
    parser.add_argument("--vocab", type=int, default=VOCAB, help=f"default {VOCAB}")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default bf16 on CUDA, else fp32")
    parser.add_argument(
        "--rounds", type=int, help="passes of each way; default 3, or 2 if they are long"
    )
    parser.add_argument(
        "--baselines", nargs="+", choices=BASELINES, help="default all that run here"
    )
    parser.add_argument("--full", action="store_true", help="all sizes on a CPU too: hours")
    parser.add_argument("--json", action="store_true", help="print a JSON list of the rows")
    return parser


if __name__ == "__main__":
    sys.exit(main())

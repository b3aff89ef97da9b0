"""Time what a training checkpoint costs the loop: saved in the background, against waiting for it.

One rank, one thread, a random model of 200M parameters; needs no weights and no GPU.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict

# Before torch is imported: the other core is the writer's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As the launcher starts ranks.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from sync_benchmark.quiet import silence_libraries


def main() -> int:
    """Parse the command line, measure, print the table."""
    args = _parser().parse_args()
    silence_libraries()
    # Late, because importing Megatron-Core takes seconds that --help should not.
    from save_benchmark.measure import measure

    rows = [
        measure(
            layers=args.layers,
            dtype=dtype,
            num_tokens=args.tokens,
            steps=args.steps,
            rounds=args.rounds,
        )
        for dtype in args.dtypes
    ]
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return 0
    print(f"{os.cpu_count()} CPU cores, 1 computes; {args.rounds} rounds of {args.steps} updates")
    print("                                        median seconds that the loop loses")
    print(" params  dtype  checkpoint  tokens  update    sync  background  background / sync")
    for row in rows:
        print(
            f"{row.params / 1e6:6.1f}M  {row.dtype:>5}  {row.checkpoint_bytes / 2**30:6.2f} GiB"
            f"  {row.num_tokens:6}  {row.step_s:6.2f}  {row.sync_s:6.2f}  {row.async_s:10.2f}"
            f"  {row.ratio:.1%} [{row.ratio_low:.1%}, {row.ratio_high:.1%}]"
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12, help="default 12: 200M parameters")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument(
        "--tokens",
        type=int,
        default=256,
        help="of an update, default 256: with far more, its noise hides a save",
    )
    parser.add_argument("--steps", type=int, default=2, help="updates of a loop, default 2")
    parser.add_argument("--rounds", type=int, default=11, help="loops of each way, default 11")
    parser.add_argument("--json", action="store_true", help="print a JSON list of the rows")
    return parser


if __name__ == "__main__":
    sys.exit(main())

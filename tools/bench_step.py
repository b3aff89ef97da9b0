"""Time an optimizer update: micro-batches by token budget against fixed ones of four sequences.

One rank, a random model of 9M parameters, answers with a long tail of lengths; no GPU needed.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict

# Before torch is imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from sync_benchmark.quiet import silence_libraries


def main() -> int:
    """Parse the command line, measure, print the table."""
    args = _parser().parse_args()
    if args.budget < args.prompt + args.longest:
        print(f"--budget: found {args.budget}, a sequence has up to {args.prompt + args.longest}")
        return 2
    if min(args.sequences, args.median, args.longest, args.prompt, args.rounds) < 1:
        print("found a size below 1, expected at least 1 of each")
        return 2
    if args.sequences % 4:
        print(f"--sequences: found {args.sequences}, expected a multiple of 4")
        return 2
    silence_libraries()
    # Late, because importing Megatron-Core takes seconds that --help should not.
    from step_benchmark.measure import measure

    rows = measure(
        num_sequences=args.sequences,
        median=args.median,
        longest=args.longest,
        prompt=args.prompt,
        budget=args.budget,
        rounds=args.rounds,
    )
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return 0
    ours = rows[0]
    print(
        f"{ours.num_sequences} sequences of up to {ours.longest} tokens, {ours.num_tokens} in all; "
        f"{args.rounds} rounds, medians\n"
        f"{'micro-batches':40}  padding  seconds  speedup of the budget\n"
        f"{f'at most {ours.max_tokens_per_micro_batch} tokens':40}  {ours.padding_share:7.1%}"
        f"  {ours.seconds:7.2f}"
    )
    for row in rows:
        print(
            f"{f'of 4, padded to the {row.baseline}':40}  {row.baseline_padding_share:7.1%}"
            f"  {row.baseline_seconds:7.2f}  {row.speedup:.2f}"
        )
    print(f"largest difference of the losses: {max(row.loss_difference for row in rows):.1e}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"sequences": 48, "median": 100, "longest": 1024, "prompt": 32, "budget": 2048}
    for name, default in (sizes | {"rounds": 5}).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--json", action="store_true", help="print a JSON list of the rows")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Time the grading of ordinary answers: the grader with its workers, against math-verify in-line.

In-line is one process that calls parse and verify, answer by answer; it survives no hostile one.
"""

import argparse
import json
import sys
from dataclasses import asdict


def main() -> int:
    """Parse the command line, measure, print the table."""
    args = _parser().parse_args()
    if min(args.answers, args.workers, args.rounds) < 1:
        print("found a size below 1, expected at least 1 of each")
        return 2
    # Late, because importing the algebra system takes a second that --help should not.
    from grading_benchmark.measure import measure

    result = measure(
        num_answers=args.answers, num_workers=args.workers, rounds=args.rounds, seed=args.seed
    )
    if args.json:
        print(json.dumps(asdict(result), indent=2))
        return 0
    print(f"{result.num_answers} answers, {result.rounds} alternating rounds, medians")
    print(f"{'':34}  seconds  answers/s  right")
    rows = (
        (f"grader, {result.num_workers} workers", result.grader_s, result.num_right),
        ("math-verify in-line, 1 process", result.inline_s, result.num_right_inline),
    )
    for name, seconds, right in rows:
        print(f"{name:34}  {seconds:7.2f}  {result.num_answers / seconds:9.0f}  {right:5}")
    print(
        f"speedup: {result.speedup:.1f}; decided by spelling: {result.share_by_spelling:.1%}; "
        f"not graded: {result.num_ungraded}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"answers": 10_000, "workers": 2, "rounds": 3, "seed": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())

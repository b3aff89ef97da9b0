"""Train the arithmetic model by every method, a few seeds each, and write a table of pass@1.

Finished commands are not run again: the same call goes on where it was stopped.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from ablation.plan import METHODS, base_scores, plan, summary_of
from ablation.run import JobFailed, run_jobs
from ablation.table import T_975, report

from osft_mcore.errors import ConfigError


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def main() -> int:
    """Run what is missing, then write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, default=3, help="of each method; default 3")
    parser.add_argument("--steps", type=int, default=36, help="of each run; default 36")
    args = parser.parse_args()
    if not 1 <= args.seeds - 1 <= max(T_975):
        print(f"--seeds: found {args.seeds}, expected 2 to {max(T_975) + 1}", file=sys.stderr)
        return 2
    if args.steps < 1:
        print(f"--steps: found {args.steps}, expected at least 1", file=sys.stderr)
        return 2
    out = args.out.absolute()
    # The commands name tools/ and conf/ from there.
    os.chdir(Path(__file__).parents[1])
    seeds = range(1, args.seeds + 1)
    try:
        run_jobs(plan(out, seeds=seeds, steps=args.steps), logs=out / "logs")
    except ConfigError as error:
        print("--out:", *error.problems, sep="\n  ", file=sys.stderr)
        return error.exit_code
    except JobFailed as error:
        print(error, file=sys.stderr)
        return 1
    base = _read(base_scores(out))["pass_at_1_by_temperature"]
    scores = {
        method: [
            _read(summary_of(out, method, seed))[
                "pass_at_1" if method == "offline" else "osft_pass_at_1"
            ]
            for seed in seeds
        ]
        for method in METHODS
    }
    text = report(base, scores)
    (out / "table.md").write_text(text, encoding="utf-8")
    print(f"{text}\nwritten: {out / 'table.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Kill and freeze every rank in every phase of small runs with the real engine, and write down how
long the run took to end, and what it said."""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

from faults.cells import FAULTS, LAUNCHERS, LAYOUTS, NUM_RANKS, PHASES, make_inputs, run_cell
from faults.table import as_table, write_table


def main() -> int:
    """Run the chosen cells; the exit code is 1 if a run outlived its deadline, or named nobody."""
    args = _parser().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        inputs = make_inputs(Path(scratch) / "data")
        cells = []
        chosen = itertools.product(
            args.launchers, args.layouts, args.phases, args.ranks, args.faults
        )
        for launcher, layout, phase, rank, fault in chosen:
            folder = Path(scratch) / f"{launcher}_{layout}_{phase}_{rank}_{fault}"
            cells.append(
                run_cell(
                    folder, inputs, launcher=launcher, layout=layout, phase=phase, rank=rank,
                    fault=fault, deadline_s=args.deadline,
                )
            )  # fmt: skip
            print(cells[-1], flush=True)
            if args.write:
                # After every cell: one that is cut off leaves what it has.
                write_table(args.write, as_table(cells, deadline_s=args.deadline))
    print(as_table(cells, deadline_s=args.deadline))
    return int(any(cell.is_broken(args.deadline) for cell in cells))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--ranks", nargs="+", type=int, default=list(range(NUM_RANKS)))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--deadline", type=float, default=20.0, help="seconds, of every phase")
    parser.add_argument("--write", type=Path, help="document to put the table into")
    return parser


if __name__ == "__main__":
    sys.exit(main())

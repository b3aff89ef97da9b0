"""Kill and freeze every rank in every phase of small runs with the real engine, and write down how
long the run took to end, and what it said."""

import argparse
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

from faults.cells import FAULTS, LAYOUTS, NUM_RANKS, PHASES, Cell, run_cell
from faults.table import as_table, write_table

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run the chosen cells; the exit code is 1 if a run outlived its deadline, or named nobody."""
    args = _parser().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        inputs = make_inputs(Path(scratch))
        cells = []
        chosen = itertools.product(args.layouts, args.phases, args.ranks, args.faults)
        for layout, phase, rank, fault in chosen:
            folder = Path(scratch) / f"{layout}_{phase}_{rank}_{fault}"
            cells.append(
                run_cell(
                    folder, inputs, layout=layout, phase=phase, rank=rank, fault=fault,
                    deadline_s=args.deadline,
                )
            )  # fmt: skip
            print(cells[-1], flush=True)
    table = as_table(cells, deadline_s=args.deadline)
    print(table)
    if args.write:
        write_table(args.write, table)
    return int(any(is_broken(cell, args.deadline) for cell in cells))


def is_broken(cell: Cell, deadline_s: float) -> bool:
    """Whether a promise was: the end comes in time, as a failure, and says who was lost."""
    return cell.seconds > deadline_s + 10 or cell.code == 0 or not cell.told


def make_inputs(folder: Path) -> list[str]:
    """A tiny model with random weights, sums to answer, and the options of the runs."""
    make = [sys.executable, str(ROOT / "tools" / "make_arithmetic.py"), "--out", str(folder / "d")]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    return [
        f"model.path={folder / 'd' / 'model'}", "model.init=random", "model.dtype=fp32",
        f"data.train={folder / 'd' / 'train.parquet'}",
        f"evaluation.files=[{folder / 'd' / 'eval.parquet'}]",
        "evaluation.every=1", "evaluation.max_problems=64", "evaluation.num_samples=2",
        "evaluation.before=false", "train.steps=1000", "train.prompts_per_step=64",
        "train.prompts_per_update=32", "train.micro_batch_size=8", "rollout.max_prompt_tokens=32",
        "rollout.max_response_tokens=64", "rollout.kv_cache_gib=0.1", "checkpoint.every=1",
        "checkpoint.async=false", "report.at_end=false", "report.every_minutes=0",
    ]  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--ranks", nargs="+", type=int, default=list(range(NUM_RANKS)))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--deadline", type=float, default=20.0, help="seconds, of every phase")
    parser.add_argument("--write", type=Path, help="document to put the table into")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Score a model twice, the second time killed in the middle and started again, and compare every
file: `check_killed_evaluation.py --out FOLDER option=value ...`, options of `osft evaluate`."""

import argparse
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    """0 if the two runs left the same results and answers, byte for byte."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for both; must not exist")
    parser.add_argument("--after", type=int, default=5, help="portions before the kill")
    parser.add_argument("options", nargs="+", metavar="option=value")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    whole, killed = args.out / "whole", args.out / "killed"
    began = time.monotonic()
    finish(evaluate(whole, args.options), whole)
    print(f"undisturbed: {time.monotonic() - began:.0f} s")
    first = evaluate(killed, args.options)
    while (done := len(list(killed.glob("evaluations/*.portions/*.jsonl")))) < args.after:
        if first.poll() is not None:
            sys.exit(f"it ended after {done} portions, before --after {args.after}; lower that")
        time.sleep(0.05)
    # The kernel ends the ranks with it.
    first.kill()
    first.wait()
    print(f"killed with {done} portions done")
    finish(evaluate(killed, args.options), killed)
    return compare(whole / "evaluations", killed / "evaluations")


def evaluate(folder: Path, options: list[str]) -> "subprocess.Popen[bytes]":
    """`osft evaluate` into `folder`, under way; what it says goes to a file beside the folder."""
    command = [sys.executable, "-m", "osft_mcore.cli", "evaluate", f"output_dir={folder}"]
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([*command, *options], stdout=log, stderr=log)


def finish(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    """Wait for its end, and leave if it failed."""
    if code := process.wait():
        said = folder.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
        sys.exit(f"osft evaluate ended with {code}:\n{said[-2000:]}")


def compare(whole: Path, killed: Path) -> int:
    """Say of every file whether it is the same; 1 if one is not."""
    names = sorted({path.name for folder in (whole, killed) for path in folder.iterdir()})
    different = 0
    for name in names:
        pair = [folder / name for folder in (whole, killed)]
        same = all(path.is_file() for path in pair) and pair[0].read_bytes() == pair[1].read_bytes()
        different += not same
        print(f"{'same' if same else 'DIFFERENT'}  {name}")
    return int(different > 0 or not names)


if __name__ == "__main__":
    sys.exit(main())

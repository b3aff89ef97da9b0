"""Rewrite tests/golden/osft_20_steps.jsonl: run after a reviewed change of the loop's numbers."""

import argparse
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"


def main() -> None:
    """The run is the test's own, recorded instead of compared."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", action="store_true", help="train new weights to start from, too")
    arguments = parser.parse_args()
    sys.path[:0] = [str(TESTS), str(TESTS / "distributed")]
    import conftest  # noqa: F401  (threads, offline)
    import test_golden_run as golden

    with tempfile.TemporaryDirectory() as root:
        if arguments.start:
            golden.record_start(Path(root) / "start")
        golden.record(Path(root) / "run")
    print(f"wrote {golden.GOLDEN.relative_to(TESTS.parent)}")


if __name__ == "__main__":
    main()

"""Rewrite tests/golden/osft_20_steps.jsonl: run after a reviewed change of the loop's numbers."""

import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"


def main() -> None:
    """The run is the test's own, recorded instead of compared."""
    sys.path[:0] = [str(TESTS), str(TESTS / "dist")]
    import conftest  # noqa: F401  (threads, offline)
    from test_golden_run import GOLDEN, regenerate

    with tempfile.TemporaryDirectory() as root:
        regenerate(Path(root))
    print(f"wrote {GOLDEN.relative_to(TESTS.parent)}")


if __name__ == "__main__":
    main()

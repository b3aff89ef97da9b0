"""Hold a demo's summary.json against what the demo claims; exit code 1 if it falls short."""

import argparse
import json
import sys
from pathlib import Path

MIN_GAIN, MIN_GAIN_LOW, MAX_BASE_GREEDY, MAX_LOGPROB_DIFF = 0.20, 0.10, 0.95, 1e-3
MAX_COUPLED_MOVE = 0.05


def main() -> int:
    """Read the summary and print every claim with its figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("summary", type=Path)
    parser.add_argument("--coupled", action="store_true", help="the control: nothing may move")
    args = parser.parse_args()
    summary = json.loads(args.summary.read_text(encoding="utf-8"))
    diff, gain = summary["sync/logprob_diff_max"], summary["gain"]
    claims = [(f"log-probabilities agree to {MAX_LOGPROB_DIFF:g}", diff, diff <= MAX_LOGPROB_DIFF)]
    if args.coupled:
        name = f"pass@1 moves by less than {MAX_COUPLED_MOVE}"
        claims.append((name, gain, abs(gain) < MAX_COUPLED_MOVE))
    else:
        low = summary["gain_ci95"][0]
        greedy = summary["base_pass_at_1_by_temperature"]["0"]
        claims += [
            (f"gain of at least {MIN_GAIN}", gain, gain >= MIN_GAIN),
            (f"lower end of its interval above {MIN_GAIN_LOW}", low, low > MIN_GAIN_LOW),
            (f"starting model, greedy, below {MAX_BASE_GREEDY}", greedy, greedy < MAX_BASE_GREEDY),
        ]
    for claim, figure, holds in claims:
        print(f"{'ok ' if holds else 'NOT'}  {claim}: {figure:.4g}")
    return 0 if all(holds for *_, holds in claims) else 1


if __name__ == "__main__":
    sys.exit(main())

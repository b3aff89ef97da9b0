#!/usr/bin/env bash
# Online SFT on Qwen2.5-Math-7B, 8 GPUs: the first release's run (osft_1e7_dsr_tau0s6.sh).
# checkpoint.every=50 is ours, for less to be lost with a run that ends early; the release's script has 100.
set -euo pipefail
cd "$(dirname "$0")/../.."
osft train experiment=osft_qwen2.5_math_7b checkpoint.every=50 "$@"

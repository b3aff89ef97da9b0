#!/usr/bin/env bash
# Online SFT on Qwen2.5-Math-7B, 8 GPUs: the first release's run (osft_1e7_dsr_tau0s6.sh).
set -euo pipefail
cd "$(dirname "$0")/../.."
osft train experiment=osft_qwen2.5_math_7b checkpoint.every=50 "$@"

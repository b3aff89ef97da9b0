#!/usr/bin/env bash
# Online SFT on Qwen2.5-Math-1.5B, one GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
osft train experiment=osft_qwen2.5_math_1.5b checkpoint.every=50 "$@"

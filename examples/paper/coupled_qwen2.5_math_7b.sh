#!/usr/bin/env bash
# The control with coupled temperatures on Qwen2.5-Math-7B, 8 GPUs.
# checkpoint.every=50 is ours, for less to be lost with a run that ends early; the release's script has 300.
set -euo pipefail
cd "$(dirname "$0")/../.."
osft train experiment=coupled_qwen2.5_math_7b checkpoint.every=50 "$@"

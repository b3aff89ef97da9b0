#!/usr/bin/env bash
# SePT with annealing on Qwen2.5-Math-7B, 8 GPUs: the paper's main run (sept_1e7_dsr.sh).
# checkpoint.every=50 is ours, for less to be lost with a run that ends early; the release's script has 300.
set -euo pipefail
cd "$(dirname "$0")/../.."
osft train experiment=sept_qwen2.5_math_7b checkpoint.every=50 "$@"

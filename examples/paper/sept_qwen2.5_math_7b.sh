#!/usr/bin/env bash
# SePT with annealing on Qwen2.5-Math-7B, 8 GPUs: the paper's main run (sept_1e7_dsr.sh).
set -euo pipefail
cd "$(dirname "$0")/../.."
osft train experiment=sept_qwen2.5_math_7b checkpoint.every=50 "$@"

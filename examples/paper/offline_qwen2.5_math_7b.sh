#!/usr/bin/env bash
# Offline SePT on Qwen2.5-Math-7B, 8 GPUs: one answer of the base model to every prompt, at 0.6
# (generate_solutions.sh), then SFT on them (offline_train.sh).
set -euo pipefail
cd "$(dirname "$0")/../.."
osft generate experiment=sept_qwen2.5_math_7b rollout.annealing.mode=off output_dir=runs/solutions
python tools/solutions_to_sft.py --solutions runs/solutions/solutions.jsonl \
  --out data/deepscaler_tau0.6.parquet --truncated keep
osft sft experiment=offline_qwen2.5_math_7b "$@"

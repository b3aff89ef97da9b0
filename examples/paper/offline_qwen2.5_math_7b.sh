#!/usr/bin/env bash
# Offline SePT on Qwen2.5-Math-7B, 8 GPUs: one answer of the base model to every prompt, at 0.6
# (generate_solutions.sh: gpu memory 0.9, enforce_eager=False), then SFT on them (offline_train.sh).
# Started again it goes on where it stopped. For new answers delete runs/solutions and $answers.
set -euo pipefail
cd "$(dirname "$0")/../.."
answers=data/deepscaler_tau0.6.parquet

if [[ ! -e $answers ]]; then
  # 86: all of them are there already.
  osft generate experiment=sept_qwen2.5_math_7b rollout.annealing.mode=off output_dir=runs/solutions \
    rollout.gpu_memory_utilization=0.9 rollout.enforce_eager=false || { code=$?; ((code == 86)) || exit "$code"; }
  python tools/solutions_to_sft.py --solutions runs/solutions/solutions.jsonl \
    --out "$answers" --truncated keep
fi
osft sft experiment=offline_qwen2.5_math_7b "$@"

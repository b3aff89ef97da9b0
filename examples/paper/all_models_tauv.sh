#!/usr/bin/env bash
# The scores of three base models at 13 temperatures, 8 GPUs: all_models_tauv.sh. From it are the models,
# the temperatures (0 to 1.2 by 0.1, greedy at 0) and 8 samples. Problems and lengths are those of the
# release's training scripts; prompts those of our presets. Sampling as in base_model_sweep.sh is ours.
set -euo pipefail
cd "$(dirname "$0")/../.."
for model in llama3.1_8b_instruct qwen2.5_7b qwen2.5_math_7b; do
  # 86: this model is scored already.
  osft evaluate "experiment=sept_$model" "output_dir=runs/sweep_$model" evaluation.sweep=0:1.2:0.1 \
    'evaluation.files=[math500,amc,aime,aime25,olympiadbench,minerva]' evaluation.num_samples=8 \
    rollout.tp=1 rollout.gpu_memory_utilization=0.9 rollout.enforce_eager=false "$@" ||
    { code=$?; ((code == 86)) || exit "$code"; }
done

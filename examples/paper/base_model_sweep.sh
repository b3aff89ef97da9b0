#!/usr/bin/env bash
# The base model's scores at 17 temperatures, 8 GPUs: base_model_sweep.sh. From it are the temperatures
# (eval.tau_range 0 to 1.6 by 0.1), 32 samples (N; one where it is greedy) and gpu memory 0.9.
# enforce_eager=False is of generate_solutions.sh; vLLM on one GPU, problems, prompt and lengths are those
# of sept_1e7_dsr.sh.
# It grades beside sampling, 256 prompts at a time; here that is evaluation.portion, in answers.
# trained_model_sweep.sh is the same on a trained model:
#
#   base_model_sweep.sh model.path=runs/sept_qwen2.5_math_7b/hf output_dir=runs/sweep_trained
set -euo pipefail
cd "$(dirname "$0")/../.."
osft evaluate experiment=sept_qwen2.5_math_7b output_dir=runs/sweep_base evaluation.sweep=0:1.6:0.1 \
  evaluation.num_samples=32 rollout.tp=1 rollout.gpu_memory_utilization=0.9 rollout.enforce_eager=false \
  "$@"

#!/usr/bin/env bash
# The demo's model on six benchmarks, four samples a problem, on CPU: scored once undisturbed, and once
# killed in the middle and started again; every file must be the same. The model knows sums only, so
# that its scores are near 0; the way is that of a model that knows more.
# Needs `make demo` before, and the benchmarks in data/:
#   python tools/prepare_data.py math500 amc23 aime aime25 minerva olympiadbench
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
rm -rf runs/benchmarks
mkdir -p runs/benchmarks
cp -r runs/arithmetic/hf runs/benchmarks/model
# Room for the longest problem: a token is a byte here.
sed -i 's/"max_position_embeddings": *[0-9]*/"max_position_embeddings": 8192/' runs/benchmarks/model/config.json

python tools/check_killed_evaluation.py --out runs/benchmarks/scores \
  model.path=runs/benchmarks/model model.dtype=fp32 data.folder="${1:-data}" \
  'evaluation.files=[math500,amc23,aime,aime25,minerva,olympiadbench]' evaluation.num_samples=4 \
  evaluation.portion=512 rollout.max_prompt_tokens=4500 rollout.max_response_tokens=24 \
  rollout.max_num_seqs=64 report.at_end=false

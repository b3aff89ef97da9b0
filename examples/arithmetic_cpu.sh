#!/usr/bin/env bash
# The demo: a 0.8M-parameter model learns chain sums from faulty traces (SFT), then improves on its
# own answers (OSFT). Two processes: Megatron-Core tensor parallel 2, vLLM tensor parallel 2.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
rm -rf runs/arithmetic

echo "== 1/3 data: chain sums, some worked steps wrong"
python tools/make_arithmetic.py --out runs/arithmetic/data --seed 7

echo "== 2/3 SFT from random weights"
osft sft experiment=arithmetic_sft

echo "== 3/3 OSFT: sample at 0.6, train at 1"
osft train experiment=arithmetic_osft
python tools/check_demo.py runs/arithmetic/summary.json
echo "written: runs/arithmetic/summary.json"

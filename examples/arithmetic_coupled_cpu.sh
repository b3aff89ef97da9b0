#!/usr/bin/env bash
# The control after arithmetic_cpu.sh: sampling and training at temperature 1 must not improve.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
test -d runs/arithmetic/sft/hf || { echo "run make demo first: it trains the starting model"; exit 1; }
rm -rf runs/arithmetic_coupled
osft train experiment=arithmetic_coupled
python tools/check_demo.py --coupled runs/arithmetic_coupled/summary.json

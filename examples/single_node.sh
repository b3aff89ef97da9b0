#!/usr/bin/env bash
# The paper's main run on one machine with 8 GPUs. What it needs first:
#   models/Qwen2.5-Math-7B   the model's folder
#   data/                    python tools/prepare_data.py deepscaler math500 amc23 amc aime aime25 olympiadbench minerva
# It goes on where it stopped when it is started again.
set -euo pipefail
cd "$(dirname "$0")/.."

run=runs/sept_qwen2.5_math_7b
for option in "$@"; do
  if [[ $option == output_dir=* ]]; then run=${option#output_dir=}; fi
done

osft train --dry-run experiment=sept_qwen2.5_math_7b "$@"
# 86: all steps are done.
osft train experiment=sept_qwen2.5_math_7b checkpoint.every=50 "$@" || { code=$?; ((code == 86)) || exit "$code"; }
osft report "$run"

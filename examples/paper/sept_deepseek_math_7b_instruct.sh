#!/usr/bin/env bash
# SePT on DeepSeek-Math-7B-Instruct, 8 GPUs.
set -euo pipefail
cd "$(dirname "$0")/../.."
osft train experiment=sept_deepseek_math_7b_instruct checkpoint.every=50 "$@"

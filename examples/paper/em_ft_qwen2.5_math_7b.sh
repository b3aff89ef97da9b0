#!/usr/bin/env bash
# EM-FT on Qwen2.5-Math-7B, 8 GPUs: the entropy baseline (em_1e7_dsr.sh).
set -euo pipefail
cd "$(dirname "$0")/../.."
osft train experiment=em_ft_qwen2.5_math_7b "$@"

#!/usr/bin/env bash
# SePT on Qwen2.5-7B, 8 GPUs.
set -euo pipefail
cd "$(dirname "$0")/../.."
osft train experiment=sept_qwen2.5_7b checkpoint.every=50 "$@"

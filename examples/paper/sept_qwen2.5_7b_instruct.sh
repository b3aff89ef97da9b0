#!/usr/bin/env bash
# SePT on Qwen2.5-7B-Instruct, 8 GPUs.
# checkpoint.every=50 is ours, for less to be lost with a run that ends early; the release's script has 300.
set -euo pipefail
cd "$(dirname "$0")/../.."
osft train experiment=sept_qwen2.5_7b_instruct checkpoint.every=50 "$@"

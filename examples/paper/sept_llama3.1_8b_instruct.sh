#!/usr/bin/env bash
# SePT on Llama-3.1-8B-Instruct, 8 GPUs: the paper's failure case.
set -euo pipefail
cd "$(dirname "$0")/../.."
osft train experiment=sept_llama3.1_8b_instruct checkpoint.every=50 "$@"

#!/usr/bin/env bash
# SePT on Llama-3.1-8B-Instruct, 8 GPUs: the paper's failure case.
# checkpoint.every=50 is ours, for less to be lost with a run that ends early; the release's script has 300.
set -euo pipefail
cd "$(dirname "$0")/../.."
osft train experiment=sept_llama3.1_8b_instruct checkpoint.every=50 "$@"

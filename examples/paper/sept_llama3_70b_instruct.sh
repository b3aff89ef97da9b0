#!/usr/bin/env bash
# SePT on Llama-3-70B-Instruct, 64 GPUs, under Slurm. The first argument is the run's folder.
# checkpoint.every=50 is ours, for less to be lost with a run that ends early; the release's script has 300.
set -euo pipefail
cd "$(dirname "$0")/../.."
run=${1:?"usage: sept_llama3_70b_instruct.sh /shared/path/of/the/run option=value ..."}
shift
sbatch --nodes 8 examples/slurm/train.sbatch "$run" experiment=sept_llama3_70b_instruct checkpoint.every=50 "$@"

#!/usr/bin/env bash
# Online SFT on two machines or more without Slurm. Start it on each of them, with the same arguments:
# the number of machines, one of them as the meeting point, then options of `osft train`.
#
#   multi_node_torchrun.sh 2 node-a:29500 experiment=sept_qwen2.5_math_7b parallel=2x8 output_dir=/shared/a
#
# output_dir must be a folder that all of them see.
set -euo pipefail

nodes=${1:?"usage: multi_node_torchrun.sh NODES HOST:PORT option=value ..."}
meeting_point=${2:?"usage: multi_node_torchrun.sh NODES HOST:PORT option=value ..."}
shift 2

exec "${OSFT_PYTHON:-python}" -m torch.distributed.run \
  --nnodes "$nodes" --nproc-per-node "${OSFT_GPUS:-8}" --max-restarts "${OSFT_MAX_RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-id "${OSFT_RUN_ID:-osft}" --rdzv-endpoint "$meeting_point" \
  -m osft_mcore.cli train "$@"

#!/usr/bin/env bash
# Online SFT on two machines or more without Slurm. Start it on each of them, with the same arguments:
# the number of machines, one of them as the meeting point, then options of `osft train`.
#
#   multi_node_torchrun.sh 2 node-a:29500 experiment=sept_qwen2.5_math_7b parallel=2x8 output_dir=/shared/a
#
# output_dir must be a folder that all of them see. When a machine is lost the others wait for it, ten
# minutes (--rdzv-conf join_timeout=SECONDS): start the same line there again, and all go on from the
# newest whole checkpoint (set checkpoint.every). If it was the meeting point, the others end, too:
# start the line on all of them. GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network interface,
# where machines find each other by the wrong one.
set -euo pipefail

nodes=${1:?"usage: multi_node_torchrun.sh NODES HOST:PORT option=value ..."}
meeting_point=${2:?"usage: multi_node_torchrun.sh NODES HOST:PORT option=value ..."}
shift 2

# Where the port is another program's, torchrun would wait there without a word.
"${OSFT_PYTHON:-python}" -m osft_mcore.cli doctor --meeting-point "$meeting_point"

# Else a machine that comes back asks torchrun for an address that the others told in the first round
# only, and all of them end after a minute.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# checkpoint.stop_after counts from here, also in ranks that torchrun starts again, and a file
# OUTPUT_DIR/stop that is younger than this is for them.
OSFT_STARTED=$(date +%s)
export OSFT_STARTED

exec "${OSFT_PYTHON:-python}" -m torch.distributed.run \
  --nnodes "$nodes" --nproc-per-node "${OSFT_GPUS:-8}" --max-restarts "${OSFT_MAX_RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-id "${OSFT_RUN_ID:-osft}" --rdzv-endpoint "$meeting_point" \
  -m osft_mcore.cli train "$@"

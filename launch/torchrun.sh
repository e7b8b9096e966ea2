#!/usr/bin/env bash
# Train with torchrun: launch/torchrun.sh CONFIG [key=value ...], on every host.
#
#   NNODES       number of hosts (default: 1)
#   NODE_RANK    this host's number, from 0 (default: 0)
#   MASTER_ADDR  name or address of host 0 (default: this host, enough for one)
#   MASTER_PORT  a port of host 0 that the others can reach (default: 29500)
#   RANKS        ranks a host (default: one a GPU, or two where there is none)
#
# Each host has a supervisor that restarts its own ranks; that of host 0 writes run.dir/status.json and log.txt.
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
    echo "usage: launch/torchrun.sh CONFIG [key=value ...]" >&2
    exit 2
fi

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > ranks ? $(nproc) / ranks : 1))}

exec python -m launch.supervise --node-rank "${NODE_RANK:-0}" -- \
    torchrun --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$ranks" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" -m train "$@"

#!/usr/bin/env bash
# Train on this machine: launch/local.sh CONFIG [key=value ...]
#
# One rank a GPU, or two ranks where there is none. RANKS, MASTER_PORT and OMP_NUM_THREADS may be set in the environment.
# Stops, restarts and exit codes are the supervisor's: see launch/supervise.py and docs/operations.md.
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
    echo "usage: launch/local.sh CONFIG [key=value ...]" >&2
    exit 2
fi

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > ranks ? $(nproc) / ranks : 1))}
((gpus > 0)) || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}

# {port}: a free one, so that several runs can share a machine.
exec python -m launch.supervise -- \
    deepspeed --num_accelerators "$ranks" --master_port "${MASTER_PORT:-{port\}}" --log_level error --module train "$@"

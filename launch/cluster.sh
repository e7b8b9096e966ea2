#!/usr/bin/env bash
# Train on several hosts over ssh: launch/cluster.sh HOSTFILE CONFIG [key=value ...]
#
# HOSTFILE has a line `NAME slots=GPUS` for each host; the first one runs rank 0. Every host needs, at the same paths, this
# directory, its Python environment, the data and run.dir (a shared file system), and must be reached by `ssh NAME` without a
# password; NAME must resolve on all of them. pdsh starts the ranks: `apt-get install pdsh`.
#
# ssh passes no environment on. Variables for the ranks go, as NAME=VALUE lines, into .deepspeed_env in this directory or the
# home directory; docs/operations.md lists those of NCCL and gloo that matter.
set -euo pipefail

if [[ $# -lt 2 || ! -f $1 ]]; then
    echo "usage: launch/cluster.sh HOSTFILE CONFIG [key=value ...]" >&2
    exit 2
fi
hostfile=$1
shift

hosts=$(awk '!/^ *(#|$)/ {print $1}' "$hostfile" | paste -sd,)
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ConnectTimeout=10 -o ServerAliveInterval=15"

# Without --ready, a start while a host is down would leave the others waiting for it.
exec python -m launch.supervise --ready "pdsh -S -R ssh -w $hosts true" -- \
    deepspeed --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" --log_level error --module train "$@"

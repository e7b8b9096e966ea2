#!/usr/bin/env bash
# Train on this machine: launch/local.sh CONFIG [key=value ...]
#
# One rank a GPU, or two ranks where there is none. RANKS, MASTER_PORT and OMP_NUM_THREADS may be set in the environment.
# Exit codes are those of `python -m train`: 0 finished, 75 stopped by a signal with a checkpoint saved, 2 a mistake in
# the config or data, 1 any other failure.
#
# The deepspeed command passes no signal on to the ranks in a way that lets them save at leisure: SIGTERM kills only its
# own process and orphans the ranks, Ctrl-C kills them after 30 seconds. So the job runs in a session of its own, and a
# signal to this script goes to the ranks, which save a checkpoint between two steps and exit.
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
    echo "usage: launch/local.sh CONFIG [key=value ...]" >&2
    exit 2
fi

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > ranks ? $(nproc) / ranks : 1))}
((gpus > 0)) || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
# Let the kernel choose a free port, so that several runs can share a machine.
port=${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}

setsid deepspeed --num_accelerators "$ranks" --master_port "$port" --log_level error --module train "$@" &
runner=$!

children() { cat "/proc/$1/task/$1/children" 2>/dev/null || true; }

signal_ranks() { # the runner's child is the node's launcher, whose children are the ranks
    for launcher in $(children "$runner"); do
        for rank in $(children "$launcher"); do
            kill "-$1" "$rank" 2>/dev/null || true
        done
    done
}
trap 'signal_ranks INT' INT
trap 'signal_ranks TERM' TERM
trap 'signal_ranks USR1' USR1

# A trapped signal interrupts `wait`: go on waiting until the job itself has ended.
while kill -0 "$runner" 2>/dev/null; do
    wait "$runner" || true
done
wait "$runner"

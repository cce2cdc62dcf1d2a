#!/usr/bin/env bash
# Trains on this machine under the DeepSpeed launcher: on all its GPUs, or on CPU ranks when it has none.
#
# Usage: bash launch/single_node.sh [--doctor] CONFIG [key=value | option …]
#   --doctor            only checks the environment, on every rank
#   CONFIG              YAML file, for example configs/quickstart.yaml
#   key=value, options  handed to `nextlat train`, for example training.seed=7
#   NPROC=4             number of ranks (default: all GPUs, or 2 on CPU)
#   MASTER_PORT=29500   rendezvous port (default: a free one)
#   MAX_RESTARTS=3      starts again from the last checkpoint after so many failures
#
# SIGTERM and SIGUSR1 are handed to the ranks, which save and stop: exit code 75, run the same command to resume.

set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=launch/ranks.sh
source "$ROOT/launch/ranks.sh"

case "${1-}" in
    -h | --help) usage && exit 0 ;;
esac
choose_command "$@" && shift
require_config "$@"
config="$1"
shift
[[ "${NPROC-1}" =~ ^[1-9][0-9]{0,5}$ ]] || fail "NPROC is $NPROC, it must be a positive number of ranks"
require_venv
if [[ "${DS_ACCELERATOR-}" == cpu ]]; then
    NPROC="${NPROC:-2}"
elif [[ -n "${CUDA_VISIBLE_DEVICES-}" ]] && has_gpu; then
    # DeepSpeed's launcher takes numbers alone, and forgets them where it is told a number of ranks.
    [[ "${NPROC-1}" -le ${#gpus[@]} ]] ||
        fail "NPROC is $NPROC, CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES leaves ${#gpus[@]} GPUs: lower NPROC or name more"
    gpus=("${gpus[@]:0:${NPROC:-${#gpus[@]}}}")
    [[ "${gpus[0]}" != MIG-* ]] || fail "DeepSpeed's launcher takes no MIG instance (${gpus[0]}): use launch/torchrun.sh"
    CUDA_VISIBLE_DEVICES="$(IFS=, && echo "${gpus[*]}")"
    export CUDA_VISIBLE_DEVICES
    NPROC=""
fi
ranks="${NPROC:-${#gpus[@]}}"
check_environment "$config" "$@"
options=("$@")

free_port() {
    "$VENV/bin/python" -c '
import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])'
}

start_ranks() {
    # No hostfile, whatever the launcher finds elsewhere: this script is for one machine.
    local arguments=(--hostfile=/dev/null --log_level=error --no_local_rank)
    arguments+=(--master_port="${MASTER_PORT:-$(free_port)}")
    if [[ -n "${NPROC-}" ]]; then
        arguments+=(--num_gpus="$NPROC")
    fi
    deepspeed "${arguments[@]}" --module nextlat_dist.cli "$command" --config "$config" ${options[@]+"${options[@]}"} &
}

signal_ranks() { # deepspeed starts a launcher, which starts the ranks
    local inner
    inner="$(children_of "$launcher")" || return 1
    # shellcheck disable=SC2086  # several ids
    signal_children "$1" $inner
}

train_until_done here

#!/usr/bin/env bash
# Trains on this machine under the DeepSpeed launcher: on all its GPUs, or on CPU ranks when it has none.
#
# Usage: bash launch/single_node.sh CONFIG [key=value | option …]
#   CONFIG              YAML file, for example configs/quickstart.yaml
#   key=value, options  handed to `nextlat train`, for example training.seed=7
#   NPROC=4             number of ranks (default: all GPUs, or 2 on CPU)
#   MASTER_PORT=29500   rendezvous port (default: a free one)

set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

case "${1-}" in
    -h | --help) usage && exit 0 ;;
esac
require_config "$@"
config="$1"
shift
[[ "${NPROC-1}" =~ ^[1-9][0-9]*$ ]] || fail "NPROC is $NPROC, it must be a positive number of ranks"
require_venv

if [[ "${DS_ACCELERATOR-}" == cpu ]]; then
    NPROC="${NPROC:-2}"
fi
MASTER_PORT="${MASTER_PORT:-$("$VENV/bin/python" -c '
import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])')}"

# No hostfile, whatever the launcher's default place holds: this script is for one machine.
arguments=(--hostfile=/dev/null --master_port="$MASTER_PORT" --log_level=error --no_local_rank)
if [[ -n "${NPROC-}" ]]; then
    arguments+=(--num_gpus="$NPROC")
fi

# Asked to stop, the launcher would leave its ranks running; its child stops them in order. An interrupt from the terminal
# reaches that child by itself.
deepspeed "${arguments[@]}" --module nextlat_dist.cli train --config "$config" "$@" &
launcher=$!
trap 'pkill -TERM -P "$launcher" || kill -TERM "$launcher" || true' TERM HUP
trap ':' INT
status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do # it was a signal that ended the wait
    status=0
    wait "$launcher" || status=$?
done
exit "$status"

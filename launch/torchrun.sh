#!/usr/bin/env bash
# Trains under torchrun. On several hosts, start the same command on each: they find one another at RDZV_ENDPOINT.
#
# Usage: bash launch/torchrun.sh [--doctor] CONFIG [key=value | option …]
#   --doctor                  only checks the environment, on every rank
#   CONFIG                    YAML file, for example configs/fineweb_edu_1p3b.yaml
#   key=value, options        handed to `nextlat train`
#   NNODES=1                  number of hosts, or MIN:MAX: starts with MIN after half a minute, and hosts may come and go
#   NPROC=4                   ranks on this host (default: all GPUs, or 2 on CPU)
#   RDZV_ENDPOINT=HOST:PORT   one of the hosts, the same on all; needed for more than one
#   RDZV_ID=nextlat           the same on all hosts of a run
#   LOCAL_ADDR=…              address that the others reach this host at (default: what its name resolves to)
#   MAX_RESTARTS=3            starts again from the last checkpoint after so many failures
#
# Every number of hosts between MIN and MAX must divide the global batch (`WORLD_SIZE=N nextlat train --dry-run` tells).
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
options=("$@")
NNODES="${NNODES:-1}"
[[ "$NNODES" =~ ^[1-9][0-9]{0,5}(:[1-9][0-9]{0,5})?$ ]] || fail "NNODES is $NNODES, it must be a number of hosts or MIN:MAX"
[[ "$NNODES" == 1 || -n "${RDZV_ENDPOINT-}" ]] || fail "NNODES is $NNODES but RDZV_ENDPOINT is not set: give every host the same HOST:PORT"
[[ "${NPROC-1}" =~ ^[1-9][0-9]{0,5}$ ]] || fail "NPROC is $NPROC, it must be a positive number of ranks"
require_venv
if [[ -z "${NPROC-}" ]]; then
    NPROC=2
    if has_gpu; then
        NPROC="${#gpus[@]}"
    fi
fi
ranks=$((${NNODES%%:*} * NPROC))
# The hosts of one run start again together: what one of them left, any other may take over. The doctor is told, too: to a
# host that joins, the run that it joins is no other.
[[ "$NNODES" == 1 ]] || NEXTLAT_LAUNCH="torchrun-$RDZV_ENDPOINT-${RDZV_ID:-nextlat}"
check_environment "$config" "$@"

export LOCAL_SIZE="$NPROC" # read by DeepSpeed on CPU

start_ranks() {
    # Restarts are counted here and not by torchrun, which knows no failure that must not be repeated. Its own exit code
    # is 1 for all of them: pass on the first failed rank's.
    local arguments=(--nnodes="$NNODES" --nproc-per-node="$NPROC" --max-restarts=0 --rdzv-id="${RDZV_ID:-nextlat}")
    arguments+=(--rdzv-backend=c10d --rdzv-endpoint="${RDZV_ENDPOINT:-localhost:0}")
    if [[ -n "${LOCAL_ADDR-}" ]]; then
        arguments+=(--local-addr="$LOCAL_ADDR")
    fi
    "$VENV/bin/python" -c '
import sys
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
try:
    run.main(sys.argv[1:])
except ChildFailedError as error:
    code = error.get_first_failure()[1].exitcode
    sys.exit(code if code >= 0 else 128 - code)' \
        "${arguments[@]}" --module nextlat_dist.cli "$command" --config "$config" ${options[@]+"${options[@]}"} &
}

signal_ranks() { signal_children "$1" "$launcher"; }

train_until_done here

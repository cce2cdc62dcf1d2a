#!/usr/bin/env bash
# Trains on the hosts of a hostfile with DeepSpeed's launcher over pdsh and ssh. Every host needs password-less ssh and
# this project, with its .venv, at the same path.
#
# Usage: bash launch/multi_node.sh HOSTFILE CONFIG [key=value | option …]
#   HOSTFILE            a line `HOST slots=N` per host, N ranks on it
#   CONFIG              YAML file, for example configs/fineweb_edu_1p3b.yaml
#   key=value, options  handed to `nextlat train`
#   MASTER_ADDR=…       address of the first host (default: what `hostname -I` says there)
#   MASTER_PORT=29500   rendezvous port on it
#
# Variables for the ranks (GLOO_SOCKET_IFNAME=eth0, …) go into .deepspeed_env, a line NAME=value each, in the working
# directory or at home; NCCL_* are forwarded from this shell. Keep secrets out of it: they would show in process lists.

set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

case "${1-}" in
    -h | --help) usage && exit 0 ;;
esac
[[ $# -gt 0 && -n "$1" ]] || fail "no HOSTFILE given: name a file with a line 'HOST slots=N' per host (--help shows the usage)"
[[ -f "$1" ]] || fail "HOSTFILE $1 is not a file: name one with a line 'HOST slots=N' per host"
hostfile="$1"
shift
bad_line="$(grep -nvE '^[[:space:]]*(#.*)?$|^[[:space:]]*[^[:space:]#]+[[:space:]]+slots=[1-9][0-9]*' "$hostfile" | head -n 1 || true)"
[[ -z "$bad_line" ]] || fail "HOSTFILE $hostfile has the line $bad_line, every line must read 'HOST slots=N'"
grep -qE '^[[:space:]]*[^[:space:]#]' "$hostfile" || fail "HOSTFILE $hostfile names no host: add a line 'HOST slots=N' per host"
require_config "$@"
config="$1"
shift
require_venv
command -v pdsh >/dev/null || fail "pdsh is not installed: DeepSpeed's launcher needs it to reach the hosts (Debian, Ubuntu: pdsh)"

# The launcher forwards only what this file names. Ours first: a user's file has the last word.
ranks_env="$(mktemp)"
trap 'rm -f "$ranks_env"' EXIT
{
    for name in PATH TORCH_EXTENSIONS_DIR OMP_NUM_THREADS TOKENIZERS_PARALLELISM DS_ACCELERATOR HF_HUB_OFFLINE; do
        [[ -z "${!name-}" ]] || echo "$name=${!name}"
    done
    for file in "$HOME/.deepspeed_env" .deepspeed_env; do
        [[ ! -f "$file" ]] || grep -E '^[A-Za-z_][A-Za-z0-9_]*=' "$file" || true
    done
} >"$ranks_env"

arguments=(--hostfile="$hostfile" --force_multi --master_port="${MASTER_PORT:-29500}" --log_level=error --no_local_rank)
if [[ -n "${MASTER_ADDR-}" ]]; then
    arguments+=(--master_addr="$MASTER_ADDR")
fi
DS_ENV_FILE="$ranks_env" deepspeed "${arguments[@]}" --module nextlat_dist.cli train --config "$config" "$@"

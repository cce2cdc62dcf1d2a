#!/usr/bin/env bash
# Trains on the hosts of a hostfile with DeepSpeed's launcher over pdsh and ssh. Every host needs password-less ssh,
# this project, with its .venv, at the same path, and the same output_dir (a shared file system).
#
# Usage: bash launch/multi_node.sh [--doctor] HOSTFILE CONFIG [key=value | option …]
#   --doctor            only checks the environment, on every rank
#   HOSTFILE            a line `HOST slots=N` per host, N ranks on it
#   CONFIG              YAML file, for example configs/fineweb_edu_1p3b.yaml
#   key=value, options  handed to `nextlat train`
#   MASTER_ADDR=…       address of the first host (default: what `hostname -I` says there)
#   MASTER_PORT=29500   rendezvous port on it
#   MAX_RESTARTS=3      starts again from the last checkpoint after so many failures, on the hosts that still answer
#
# SIGTERM and SIGUSR1 are handed to the ranks, which save and stop: exit code 75, run the same command to resume.
# Variables for the ranks (GLOO_SOCKET_IFNAME=eth0, …) go into .deepspeed_env, a line NAME=value each, in the working
# directory or at home; NCCL_* are forwarded from this shell. Keep secrets out of it: they would show in process lists.

set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=launch/ranks.sh
source "$ROOT/launch/ranks.sh"

case "${1-}" in
    -h | --help) usage && exit 0 ;;
esac
choose_command "$@" && shift
[[ $# -gt 0 && -n "$1" ]] || fail "no HOSTFILE given: name a file with a line 'HOST slots=N' per host (--help shows the usage)"
[[ -f "$1" ]] || fail "HOSTFILE $1 is not a file: name one with a line 'HOST slots=N' per host"
hostfile="$1"
shift
bad_line="$(grep -nvE '^[[:space:]]*(#.*)?$|^[[:space:]]*[^[:space:]#]+[[:space:]]+slots=[1-9][0-9]*' "$hostfile" | head -n 1 || true)"
[[ -z "$bad_line" ]] || fail "HOSTFILE $hostfile has the line $bad_line, every line must read 'HOST slots=N'"
mapfile -t hosts < <(grep -E '^[[:space:]]*[^[:space:]#]' "$hostfile" | awk '{print $1, $2}')
((${#hosts[@]})) || fail "HOSTFILE $hostfile names no host: add a line 'HOST slots=N' per host"
lines=("${hosts[@]}") # those that the ranks run on
require_config "$@"
config="$1"
shift
options=("$@")
MASTER_PORT="${MASTER_PORT:-29500}"
require_venv
command -v pdsh >/dev/null || fail "pdsh is not installed: DeepSpeed's launcher needs it to reach the hosts (Debian, Ubuntu: pdsh)"
check_environment "$config" "$@"

# A host that is gone must end its connection within half a minute, or the launcher would wait for it.
ssh_options=(-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3)
export PDSH_RCMD_TYPE=ssh PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND-} ${ssh_options[*]}"
files="$(mktemp -d)"
trap 'rm -rf "$files"' EXIT

# The launcher forwards only what this file names. Ours first: a user's file has the last word.
{
    for name in PATH TORCH_EXTENSIONS_DIR OMP_NUM_THREADS TOKENIZERS_PARALLELISM DS_ACCELERATOR HF_HUB_OFFLINE; do
        [[ -z "${!name-}" ]] || echo "$name=${!name}"
    done
    for file in "$HOME/.deepspeed_env" .deepspeed_env; do
        [[ ! -f "$file" ]] || grep -E '^[A-Za-z_][A-Za-z0-9_]*=' "$file" || true
    done
} >"$files/env"

# ask_hosts LINE…: splits lines of the hostfile into those of hosts that answer, and names of others; asks all at once.
ask_hosts() { # sets answering, silent
    local asked=("$@") line probes=()
    for line in "${asked[@]}"; do
        ssh "${ssh_options[@]}" "${line%% *}" true </dev/null >/dev/null 2>"$files/ssh.${#probes[@]}" &
        probes+=($!)
    done
    answering=() silent=()
    for line in "${!asked[@]}"; do
        if wait "${probes[$line]}"; then
            answering+=("${asked[$line]}")
        else
            silent+=("${asked[$line]%% *}")
            echo "host ${asked[$line]%% *} does not answer over ssh: $(tail -n 1 "$files/ssh.$line")" >&2
        fi
    done
}

# The launcher waits for every host, also when one is gone and the ranks of the others wait for it.
watch_ranks() {
    local child grandchild pdsh connections
    while sleep 5 >/dev/null 2>&1; do
        pdsh="" connections=0
        for child in $(children_of "$launcher"); do
            [[ "$(command_line "$child")" != "pdsh "* ]] || pdsh="$child"
        done
        [[ -n "$pdsh" ]] || continue
        for grandchild in $(children_of "$pdsh"); do
            [[ ! "$(command_line "$grandchild")" =~ ^([^ ]*/)?ssh\  ]] || connections=$((connections + 1))
        done
        ((connections < ${#lines[@]})) || continue # no host's connection has ended
        ask_hosts "${lines[@]}"
        ((${#silent[@]})) || continue
        echo "ending the ranks of the other hosts" >&2
        lines=("${answering[@]}")
        ((${#lines[@]} == 0)) || signal_ranks KILL || true
        return 0
    done
}

# Whether this number of ranks can train this config: a resume may have fewer data-parallel ranks, but not any number.
ranks_fit() {
    local line ranks=0
    for line in "$@"; do
        ranks=$((ranks + ${line##*=}))
    done
    WORLD_SIZE="$ranks" "$VENV/bin/python" -m nextlat_dist.cli train --dry-run --config "$config" \
        ${options[@]+"${options[@]}"} >/dev/null 2>"$files/refusal"
}

before_restart() {
    ask_hosts "${hosts[@]}"
    ((${#answering[@]})) || { echo "no host of $hostfile answers: not starting again" >&2 && return 1; }
    local chosen=("${answering[@]}")
    lines=("${answering[@]}")
    # A host whose connection broke still has its ranks.
    signal_ranks KILL >/dev/null 2>&1 || true
    ((${#silent[@]})) || return 0
    until ranks_fit "${chosen[@]}"; do
        if ((${#chosen[@]} == 1)); then
            echo "not starting again without ${silent[*]}: $(head -n 1 "$files/refusal")" >&2
            return 1
        fi
        unset "chosen[-1]"
    done
    lines=("${chosen[@]}")
    echo "continuing without ${silent[*]}, on ${#lines[@]} of the hosts that answer: ${lines[*]%% *}" >&2
}

host_names() { # separated by commas
    local names=("${lines[@]%% *}")
    (IFS=, && echo "${names[*]}")
}

start_ranks() {
    printf '%s\n' "${lines[@]}" >"$files/hosts"
    local arguments=(--hostfile="$files/hosts" --force_multi --master_port="$MASTER_PORT" --log_level=error --no_local_rank)
    if [[ -n "${MASTER_ADDR-}" && "${lines[0]}" == "${hosts[0]}" ]]; then
        arguments+=(--master_addr="$MASTER_ADDR")
    fi
    DS_ENV_FILE="$files/env" deepspeed "${arguments[@]}" --module nextlat_dist.cli "$command" --config "$config" \
        ${options[@]+"${options[@]}"} &
}

signal_ranks() { # on every host, the children of DeepSpeed's launcher of this run
    local launchers="^[^ ]*python[^ ]* -u -m deepspeed.launcher.launch .*--master_port=$MASTER_PORT "
    pdsh -S -f 1024 -w "$(host_names)" \
        "bash -c 'source \"$ROOT/launch/processes.sh\" && signal_children $1 \$(processes_like \"$launchers\")'"
}

ask_hosts "${hosts[@]}"
((${#silent[@]} == 0)) || fail "not every host of $hostfile answers over ssh (see above): repair ${silent[*]}, or leave the line out"
train_until_done here

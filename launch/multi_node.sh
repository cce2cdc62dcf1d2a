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
hostfile="$1"
shift
bash "$ROOT/launch/hostfile.sh" "$hostfile" >"$files/given" || exit
mapfile -t hosts <"$files/given"
lines=("${hosts[@]}") # those that the ranks run on
require_config "$@"
config="$1"
shift
options=("$@")
MASTER_PORT="${MASTER_PORT:-29500}"
[[ "$MASTER_PORT" =~ ^[1-9][0-9]{0,4}$ ]] || fail "MASTER_PORT is $MASTER_PORT, it must be a port"
[[ "${MASTER_ADDR-0}" =~ ^[A-Za-z0-9_.:-]+$ && "${MASTER_ADDR-0}" != -* ]] || fail "MASTER_ADDR is $MASTER_ADDR, it must be an address or a name"
require_venv
for path in "$PWD" "$ROOT" "$VENV"; do # DeepSpeed's launcher hands them to the hosts' shells as they are
    [[ "$path" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] ||
        fail "$path has characters that DeepSpeed's launcher does not quote for the hosts' shells: move it to a path of letters, digits and ._-/"
done
command -v pdsh >/dev/null || fail "pdsh is not installed: DeepSpeed's launcher needs it to reach the hosts (Debian, Ubuntu: pdsh)"
ranks=0
for line in "${hosts[@]}"; do
    ranks=$((ranks + ${line##*=}))
done
check_environment "$config" "$@"
# The ranks of other hosts: their end belongs to this host's connection, their mark lies on the first.
NEXTLAT_LAUNCHER=ssh
mark="/tmp/nextlat-${files##*/}-$RANDOM$RANDOM" # nobody can guess it

# A host that is gone must end its connection within half a minute, or the launcher would wait for it.
ssh_options=(-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3)
export PDSH_RCMD_TYPE=ssh PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND-} ${ssh_options[*]}"

# quoted_for_pdsh TEXT: a word for the hosts' shells, which get it through pdsh, where %h, %n and %u mean something, and
# DeepSpeed's launcher, which puts double quotes around what has a blank, and a backslash before the quotes in it.
quoted_for_pdsh() { # sets quoted
    quoted="$1"
    [[ ! "$1" =~ ^[A-Za-z0-9_@+=:,./-]+$ ]] || return 0
    if [[ "$1" == *" "* ]]; then
        quoted="${quoted//\\/\\\\}"
        quoted="${quoted//\$/\\\$}"
        quoted="${quoted//\`/\\\`}"
        quoted="${quoted//%/\$\{NEXTLAT_NOTHING-%\}}"
    else
        quoted="'${quoted//\'/\'\\\'\'}'"
        quoted="${quoted//%/%\'\'}"
    fi
}

# The launcher forwards only what this file names. Ours first: a user's file has the last word.
{
    for name in PATH TORCH_EXTENSIONS_DIR OMP_NUM_THREADS TOKENIZERS_PARALLELISM DS_ACCELERATOR HF_HUB_OFFLINE \
        NEXTLAT_LAUNCH NEXTLAT_LAUNCHER NEXTLAT_LOG; do
        # The launcher puts double quotes around what has special characters, and quotes nothing in them.
        value="${!name-}"
        value="${value//\\/\\\\}"
        value="${value//\$/\\\$}"
        value="${value//\`/\\\`}"
        value="${value//\"/\\\"}"
        [[ -z "$value" ]] || echo "$name=$value"
    done
    echo "NEXTLAT_END_MARK=$mark"
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
    while sleep 5 >/dev/null 2>&1 && script_lives; do
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
    local words=() word quoted
    for word in --config "$config" ${options[@]+"${options[@]}"}; do
        quoted_for_pdsh "$word"
        words+=("$quoted")
    done
    DS_ENV_FILE="$files/env" deepspeed "${arguments[@]}" --module nextlat_dist.cli "$command" "${words[@]}" &
}

# on_hosts HOST,… COMMAND: a shell command; %n in it is the host's number.
on_hosts() { pdsh -S -f 1024 -w "$1" "bash -c '$2'"; }

# On every host, the children of DeepSpeed's launcher of this run, and of this host where several are one machine.
signal_ranks() {
    local launchers="^[^ ]*python[^ ]* -u -m deepspeed.launcher.launch .*--node_rank=%n "
    on_hosts "$(host_names)" "source \"$ROOT/launch/processes.sh\" && signal_children $1 \$(launchers_like \"$launchers\" NEXTLAT_LAUNCH=$NEXTLAT_LAUNCH)"
}

said_end() { # pdsh puts the host's name before a line
    on_hosts "${lines[0]%% *}" "cat $mark; rm -f $mark" 2>/dev/null | sed 's/^[^ ]*: //'
}

ask_hosts "${hosts[@]}"
((${#silent[@]} == 0)) || fail "not every host of $hostfile answers over ssh (see above): repair ${silent[*]}, or leave the line out"
status=0
train_until_done here || status=$?
[[ $status -eq 0 || "$command" != train ]] || said_end >/dev/null || true # removes the mark of a start that failed
exit "$status"

# shellcheck shell=bash
# What the launch scripts share: the project's root, the exports that every rank needs, and how they speak.
# Usage: source launch/env.sh

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
# Scripts that were copied from an installed wheel have no checkout: without an environment next to them they use the one
# that nextlat is in.
if [[ ! -f "$ROOT/pyproject.toml" && ! -x "$VENV/bin/python" ]] && command -v nextlat >/dev/null; then
    VENV="$(cd "$(dirname "$(command -v nextlat)")/.." && pwd)"
fi

# deepspeed starts ranks with bare command names, and its just-in-time builds look for ninja on the PATH.
case ":$PATH:" in
    *":$VENV/bin:"*) ;;
    *) export PATH="$VENV/bin:$PATH" ;;
esac
# One build folder per virtual environment: extensions of another torch must not be picked up.
export TORCH_EXTENSIONS_DIR="$VENV/torch_extensions"
# Ranks share the cores; more threads than cores make every rank slower.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false
export PIP_DISABLE_PIP_VERSION_CHECK=1

# The GPUs that CUDA lets this process use, as numbers of nvidia-smi, into the array gpus. CUDA_VISIBLE_DEVICES is read as
# CUDA does: numbers or beginnings of ids up to the first that is none; nothing at all where one comes twice. Of MIG
# instances CUDA shows a process one. nextlat_dist/doctor/gpus.py knows the same.
find_gpus() {
    local line entry entries=() ids=() mig="" number found
    gpus=()
    while read -r line; do # not `| grep -q`, which would close the pipe early
        [[ "$line" != "MIG "* ]] || mig=1
        [[ "$line" =~ ^GPU\ [0-9]+: ]] || continue
        [[ "$line" =~ UUID:\ ([^\)]+) ]] && ids+=("${BASH_REMATCH[1]}") || ids+=("?")
    done < <(nvidia-smi -L 2>/dev/null)
    if [[ -z "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        gpus=("${!ids[@]}")
    else
        IFS=, read -ra entries <<<"$CUDA_VISIBLE_DEVICES"
        for entry in ${entries[@]+"${entries[@]}"}; do
            entry="${entry//[[:space:]]/}"
            found=""
            if [[ "$entry" =~ ^[0-9]{1,9} ]]; then
                number=$((10#${BASH_REMATCH[0]}))
                ((number >= ${#ids[@]})) || found="$number"
            elif [[ "$entry" == GPU-* ]]; then
                for number in "${!ids[@]}"; do
                    [[ "${ids[number]}" != "$entry"* ]] || found="$number"
                done
            elif [[ "$entry" == MIG-* && -n "$mig" ]]; then
                found="$entry"
            fi
            [[ -n "$found" ]] || break
            [[ " ${gpus[*]-} " != *" $found "* ]] || { gpus=() && break; }
            gpus+=("$found")
        done
    fi
    [[ -z "$mig" ]] || gpus=(${gpus[@]+"${gpus[@]:0:1}"})
}
has_gpu() { ((${#gpus[@]})); }
find_gpus
if ! has_gpu; then
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
fi

headline() { printf '\n=== [%4ds] %s ===\n' "$SECONDS" "$*"; }

fail() {
    echo "error: $*" >&2
    exit 2
}

# The comment block at the head of the calling script is its help text.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

require_venv() {
    [[ -x "$VENV/bin/python" ]] || fail "no virtual environment at $VENV: run bash $ROOT/launch/setup.sh first"
}

require_config() {
    [[ $# -gt 0 && -n "$1" ]] || fail "no CONFIG given: name a YAML file, for example configs/quickstart.yaml (--help shows the usage)"
    [[ -f "$1" ]] || fail "CONFIG $1 is not a file: name a YAML file, for example configs/quickstart.yaml"
}

# sole_script: ends this script where another start of it, or what a killed one left running, is still at work here. The
# lock is inherited by all commands that follow: they may still write to the script's folder when it is gone.
sole_script() {
    local name="${0##*/}" lock
    name="${name%.sh}"
    lock="$ROOT/.cache/$name.lock"
    command -v flock >/dev/null || return 0
    mkdir -p "${lock%/*}"
    exec 8>>"$lock"
    flock --nonblock 8 ||
        fail "another $name, or what a killed one started, is running here ($(tail -n 1 "$lock")): wait for it or stop it"
    echo "host ${HOSTNAME:-?}, pid $$, since $(date '+%F %T')" >"$lock"
}

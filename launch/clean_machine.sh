#!/usr/bin/env bash
# The quickstart and the tests on an empty machine: debootstrap makes a Debian in a folder, with nothing but Python and a
# C++ compiler, this commit is cloned into it, and the commands of the README run there as root (chroot).
#
# Usage: bash launch/clean_machine.sh [--python 3.13] [--steps quickstart,tests] [--directory DIR]
#   --python 3.13        its Python: 3.13 (Debian 13, the default) or 3.11 (Debian 12). No Debian has 3.12: there it is
#                        only resolved whether the pinned versions that training needs can be had as wheels
#   --steps a,b          setup, quickstart, tests, in this order (default quickstart,tests)
#   --directory DIR      for the Debian and what is installed (default: a new folder in $TMPDIR or /tmp); removed at the end
#
# Needs root, debootstrap and this machine's own apt sources, whose mirror it takes; 12 GB, or 20 GB where pip finds no CPU
# build of torch. All mounts live in a mount namespace of their own, which ends with the script.

set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

python=3.13 steps=quickstart,tests directory="" inside=""
while [[ $# -gt 0 ]]; do
    case "$1" in
        -h | --help) usage && exit 0 ;;
        --inside) inside=1 && shift && continue ;; # this script's own, in the new namespace
        --python | --steps | --directory) [[ -n "${2-}" ]] || fail "$1 needs a value (--help shows the usage)" ;;
        *) fail "clean_machine.sh does not know $1 (--help shows the usage)" ;;
    esac
    printf -v "${1#--}" %s "$2"
    shift 2
done
case "$python" in
    3.11) suite=bookworm ;;
    3.12) suite="" ;;
    3.13) suite=trixie ;;
    *) fail "--python is $python, it must be 3.11, 3.12 or 3.13" ;;
esac
for step in ${steps//,/ }; do
    [[ "$step" =~ ^(setup|quickstart|tests)$ ]] || fail "--steps has $step, it may have setup, quickstart and tests"
done

# What the constraints allow for another Python. DeepSpeed is published as source only, which pip does not build for a
# Python that is not there: what DeepSpeed itself needs is asked for instead.
resolve() {
    require_venv
    headline "Resolving the pinned versions of base and train for Python $python"
    local target status=0
    target="$(mktemp -d)"
    "$VENV/bin/python" - >"$target/requirements.txt" <<'PYTHON'
import tomllib
from importlib import metadata
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
for text in [*project["dependencies"], *project["optional-dependencies"]["train"]]:
    print("\n".join(t for t in metadata.requires("deepspeed") if "extra" not in t) if text.startswith("deepspeed") else text)
PYTHON
    "$VENV/bin/python" -m pip install --quiet --dry-run --ignore-installed --python-version "$python" --only-binary=:all: \
        --target "$target/site" -c launch/constraints.txt -r "$target/requirements.txt" --report "$target/report.json" ||
        status=$?
    [[ $status -ne 0 ]] || "$VENV/bin/python" - "$target/report.json" <<'PYTHON'
import json, sys
with open(sys.argv[1]) as file:
    found = json.load(file)["install"]
print(f"{len(found)} packages resolve as wheels; DeepSpeed itself, a source package, was not tried")
PYTHON
    rm -rf "$target"
    [[ $status -eq 0 ]] || fail "the versions of launch/constraints.txt do not resolve for Python $python (see above)"
}

mirror() { # of this machine's apt: the first that ends in /debian
    find /etc/apt/sources.list /etc/apt/sources.list.d -type f -exec cat {} + 2>/dev/null |
        sed -nE 's#^(URIs:|deb( \[[^]]*\])?) +([a-z]+://[^ ]+/debian)/?( .*)?$#\3#p' | sed -n 1p
}

# What pip is told here holds there: its settings, and what these name: folders are bound read-only, files copied.
take_pip_settings() {
    local path
    mkdir -p "$directory/etc/ssl/certs"
    [[ ! -e /etc/ssl/certs/ca-certificates.crt ]] || cp -L /etc/ssl/certs/ca-certificates.crt "$directory/etc/ssl/certs/"
    cp -L /etc/resolv.conf /etc/hosts "$directory/etc/"
    python3 -m pip config list 2>/dev/null | sed -n "s/^global\.\(.*\)='\(.*\)'$/\1 = \2/p" | sed 's/\\n/\n    /g' |
        { echo "[global]" && cat; } >"$directory/etc/pip.conf"
    while read -r path; do
        if [[ -d "$path" ]]; then
            mkdir -p "$directory$path"
            mount --bind -o ro "$path" "$directory$path"
        elif [[ -f "$path" ]]; then
            mkdir -p "$directory${path%/*}"
            cp -L "$path" "$directory$path"
        fi
    done < <(grep -oE '(^| |=|file://)/[^ ]+' "$directory/etc/pip.conf" | sed -E 's#^( |=|file://)*##; s#/simple/?$##' | sort -u)
}

# In the new namespaces: nothing of this is seen outside, and all of it ends with this process.
run_inside() {
    local step command names=(PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8)
    mount -t proc proc "$directory/proc"
    mkdir -p "$directory/dev/shm" "$directory/dev/pts" # debootstrap made null, zero and so on
    mount -t tmpfs tmpfs "$directory/dev/shm"
    mount -t devpts -o newinstance,ptmxmode=0666 devpts "$directory/dev/pts"
    ln -sf pts/ptmx "$directory/dev/ptmx"
    take_pip_settings
    for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY PIP_DEFAULT_TIMEOUT; do
        [[ -z "${!name-}" ]] || names+=("$name=${!name}")
    done
    for step in ${steps//,/ }; do
        command="bash launch/${step/tests/test}.sh"
        headline "$command, with Python $python"
        chroot "$directory" env -i "${names[@]}" bash -c "cd /srv/project && $command" ||
            fail "$command failed on the empty machine (see above)"
        headline "$command succeeded"
    done
}

if [[ -z "$suite" ]]; then
    cd "$ROOT"
    resolve
    exit 0
fi
if [[ -n "$inside" ]]; then
    run_inside
    exit 0
fi
[[ $EUID -eq 0 ]] || fail "clean_machine.sh must run as root: it mounts and changes roots"
for tool in debootstrap unshare git; do
    command -v "$tool" >/dev/null || fail "$tool is not installed: install it (Debian, Ubuntu: apt-get install $tool)"
done
from="$(mirror || true)" # find fails where one of the two is missing
[[ -n "$from" ]] || fail "this machine's apt sources name no Debian mirror: debootstrap needs one"
[[ -z "$directory" || ! -e "$directory" ]] || fail "--directory $directory exists: name a new folder, it is removed at the end"
if [[ -z "$directory" ]]; then
    directory="$(mktemp -d)"
else
    mkdir -p "$directory"
    directory="$(cd "$directory" && pwd)"
fi
trap 'rm -rf --one-file-system "$directory"' EXIT # the mounts are in the other namespace

headline "Debian ($suite) in $directory"
packages=python3,python3-venv,python3-dev,gcc,g++,ca-certificates
debootstrap --variant=minbase --include="$packages" "$suite" "$directory" "$from" >"$directory.log" 2>&1 || {
    tail -n 20 "$directory.log" >&2
    fail "debootstrap failed (see above)"
}
rm -f "$directory.log"
commit="$(git -C "$ROOT" rev-parse HEAD)"
[[ -z "$(git -C "$ROOT" status --porcelain)" ]] || echo "note: changes that are not committed are left out"
headline "Commit $commit"
git clone --quiet --no-hardlinks "$ROOT" "$directory/srv/project"
git -C "$directory/srv/project" checkout --quiet --detach "$commit"
unshare --mount --pid --fork --kill-child bash "$ROOT/launch/clean_machine.sh" --inside --python "$python" --steps "$steps" \
    --directory "$directory"

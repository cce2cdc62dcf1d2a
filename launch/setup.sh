#!/usr/bin/env bash
# Creates .venv in the project root and installs the project, with what training needs, in the exact versions of
# launch/constraints.txt. Does nothing when all of that is up to date; the other scripts call it first.
#
# Usage: bash launch/setup.sh [--dev]
#   --dev               also what the tests need (launch/test.sh asks for it)
#   PYTHON=python3.11   the interpreter that makes a new .venv (default python3; 3.11 or newer)

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh

extra=train
case "${1-}" in
    "") ;;
    --dev) extra=dev ;;
    -h | --help) usage && exit 0 ;;
    *) fail "setup.sh takes no argument but --dev, got $1 (--help shows the usage)" ;;
esac

if [[ ! -f pyproject.toml ]]; then
    require_venv
    echo "nothing to set up: these scripts are a copy from an installed package, of $VENV"
    exit 0
fi
stamp_file="$VENV/setup.stamp" # a digest of what decides the versions, and the extra that was installed

# The lock is inherited by pip and the compiler: while any of them lives, no second set-up begins.
take_turn() {
    mkdir -p .cache
    command -v flock >/dev/null || return 0
    exec 9>.cache/setup.lock
    flock --nonblock 9 && return 0
    echo "another set-up of this project is running: waiting for it"
    flock 9
}

create_venv() {
    if "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        return 0
    fi
    local python="${PYTHON:-python3}" version
    version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" ||
        fail "$python does not run: install Python 3.11 or newer, or set PYTHON to one"
    [[ "${version%%.*}" -eq 3 && "${version#*.}" -ge 11 ]] ||
        fail "$python is Python $version, this project needs 3.11 or newer: set PYTHON to a newer one"
    headline "Creating .venv with Python $version"
    "$python" -m venv --clear "$VENV" ||
        fail "$python cannot create $VENV: install its venv module (Debian, Ubuntu: python3-venv)"
}

current_stamp() {
    "$VENV/bin/python" - pyproject.toml launch/constraints.txt <<'PYTHON'
import hashlib, pathlib, sys
parts = [pathlib.Path(name).read_bytes() for name in sys.argv[1:]]
print(hashlib.sha256(b"\0".join([*parts, sys.version.encode(), sys.prefix.encode()])).hexdigest())
PYTHON
}

install_packages() {
    if [[ "$(uname -s)" == Linux ]] && ! has_gpu; then
        local torch
        torch="$(grep '^torch==' launch/constraints.txt)"
        headline "No NVIDIA GPU: installing the CPU build of $torch"
        "$VENV/bin/python" -m pip install "$torch+cpu" -c launch/constraints.txt ||
            echo "note: pip found no CPU build of torch; the default build follows and may bring gigabytes of CUDA" \
                "(to avoid that, point PIP_EXTRA_INDEX_URL at PyTorch's CPU packages)"
    fi
    headline "Installing the project and its dependencies"
    "$VENV/bin/python" -m pip install -c launch/constraints.txt -e ".[$extra]" ||
        fail "pip could not install the versions of launch/constraints.txt (see above); they are made for Python 3.11 and 3.13"
}

take_turn
create_venv
stamp="$(current_stamp)"
installed=""
[[ ! -f "$stamp_file" ]] || read -r installed <"$stamp_file" || true
# What the tests need includes what training needs, and is not taken away again.
[[ "$installed" != *" dev" ]] || extra=dev
if [[ "$installed" != "$stamp $extra" ]]; then
    rm -f "$stamp_file"
    install_packages
    echo "$stamp $extra" >"$stamp_file"
fi
echo "set-up is up to date: $VENV ($("$VENV/bin/python" --version))"

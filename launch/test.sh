#!/usr/bin/env bash
# Sets up, then checks everything: ruff, mypy, import contracts, shellcheck, pytest. Stops at the first that fails.
#
# Usage: bash launch/test.sh [--slow | --faults | --hosts] [pytest arguments …]
#   --slow     also the tests that take longer than half a minute
#   --faults   of the tests only those that kill ranks again and again
#   --hosts    of the tests only those of two hosts and of Slurm, slow ones too, after installing what they need (Debian,
#              Ubuntu: apt-get, as root or through sudo): pdsh, sshd, iproute2 and Slurm. Nothing of it is started outside
#              the tests' own namespaces
#   -n 0       of pytest: one test after the other, as --pdb and -s want it

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh

selection=(-m "not slow")
hosts=""
case "${1-}" in
    -h | --help) usage && exit 0 ;;
    --slow) selection=() && shift ;;
    --faults) selection=(-m faults) && shift ;;
    --hosts) hosts=1 selection=(tests/launch/test_two_hosts.py tests/launch/test_slurm.py) && shift ;;
esac

# The services of these packages must not start here; policy-rc.d is how Debian is told so.
install_hosts() {
    local packages=(iproute2 util-linux openssh-client openssh-server pdsh munge slurmctld slurmd slurm-client)
    local as_root=() policy=/usr/sbin/policy-rc.d made=""
    command -v apt-get >/dev/null || fail "--hosts needs apt-get (Debian, Ubuntu); elsewhere install ${packages[*]} and run pytest on ${selection[*]}"
    [[ $EUID -eq 0 ]] || as_root=(sudo)
    headline "Installing what two hosts and a Slurm need: ${packages[*]}"
    if [[ ! -e "$policy" ]]; then
        printf '#!/bin/sh\nexit 101\n' | ${as_root[@]+"${as_root[@]}"} tee "$policy" >/dev/null
        ${as_root[@]+"${as_root[@]}"} chmod 755 "$policy"
        made=1
    fi
    local status=0
    { ${as_root[@]+"${as_root[@]}"} apt-get update &&
        ${as_root[@]+"${as_root[@]}"} env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
            "${packages[@]}"; } || status=$?
    [[ -z "$made" ]] || ${as_root[@]+"${as_root[@]}"} rm -f "$policy"
    [[ $status -eq 0 ]] || fail "apt-get could not install ${packages[*]} (see above)"
}

[[ -z "$hosts" ]] || install_hosts
bash launch/setup.sh --dev
export HF_HUB_OFFLINE=1

headline "ruff: lint"
ruff check .
headline "ruff: format"
ruff format --check .
headline "mypy"
mypy
headline "import-linter: which module may import which"
lint-imports
headline "shellcheck"
shellcheck --external-sources launch/*.sh launch/*.sbatch .ci/run
headline "pytest"
# A process per core, up to four, each with whole files: most tests keep one core busy, and files share ranks and datasets.
pytest -n auto --maxprocesses 4 --dist loadfile ${selection[@]+"${selection[@]}"} "$@"
headline "All checks passed"

#!/usr/bin/env bash
# Sets up, then checks everything: ruff, mypy, import contracts, shellcheck, pytest. Stops at the first that fails.
#
# Usage: bash launch/test.sh [--slow | --faults] [pytest arguments …]
#   --slow     also the tests that take longer than half a minute
#   --faults   of the tests only those that kill ranks again and again

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh

selection=(-m "not slow")
case "${1-}" in
    -h | --help) usage && exit 0 ;;
    --slow) selection=() && shift ;;
    --faults) selection=(-m faults) && shift ;;
esac

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
pytest ${selection[@]+"${selection[@]}"} "$@"
headline "All checks passed"

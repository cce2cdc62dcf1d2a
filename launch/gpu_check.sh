#!/usr/bin/env bash
# Checks what only a GPU can show, in at most nine minutes: GPU tests, attention, memory of losses, decoding with CUDA
# graphs, step times of the 1.3B shape. Runs with the Python it is given: no set-up, no network; what is not installed
# is said.
#
# Usage: bash launch/gpu_check.sh [--json FILE] [--pictures DIR] [--minutes 9] [--scale gpu|tiny]
#   PYTHON=python3   the Python (default: that of .venv where there is one)

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/env.sh
source launch/env.sh

case "${1-}" in
    -h | --help) usage && exit 0 ;;
esac
python="${PYTHON:-python3}"
[[ -n "${PYTHON-}" || ! -x .venv/bin/python ]] || python=.venv/bin/python
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
exec "$python" -m nextlat_dist.bench.gpu_check "$@"

#!/usr/bin/env bash
# From nothing to a speedup table: sets up, then trains a small NextLat model on the Python standard library's own text
# and measures self-speculative decoding with it. At most ten minutes on two CPU cores, once everything is installed.
#
# Usage: bash launch/quickstart.sh [key=value …]
#   key=value   handed to `nextlat train`, for example training.seed=7
#   NPROC=4     number of ranks (default: all GPUs, or 2 on CPU)
#
# Writes runs/quickstart: report.json, report.md, pictures, export/, prompts/. An earlier one is replaced.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
source launch/processes.sh

case "${1-}" in
    -h | --help) usage && exit 0 ;;
esac
for argument in "$@"; do
    [[ "$argument" == *=* ]] || fail "quickstart.sh takes key=value settings only, got $argument (--help shows the usage)"
done

sole_script
name_caller
bash launch/setup.sh
export HF_HUB_OFFLINE=1
run=runs/quickstart

if [[ -e "$run" ]]; then
    # A training whose launch script was killed, or on another host: it is named. One that may be dead counts as alive.
    nextlat doctor --quick --strict --config configs/quickstart.yaml output_dir="$run" || fail "$run stays as it is (see above)"
    headline "Removing $run of an earlier run (.venv stays)"
    rm -rf "$run"
fi

headline "1/6 Text and tokenizer: the Python standard library's sources, vocabulary 4096"
nextlat-data stdlib --output "$run"
nextlat-data tokenizer --input "$run/stdlib.jsonl" --output "$run/tokenizer.model" --vocab-size 4096

headline "2/6 Shards: WebDataset tars for training and validation"
nextlat-data shard --input "$run/stdlib.jsonl" --tokenizer "$run/tokenizer.model" --output "$run/data" --split-field split \
    --record-tokens 1024

headline "3/6 Training: NextLat, horizon 2"
ranks="${NPROC:-2}"
if has_gpu; then
    ranks="${NPROC:-${#gpus[@]}}"
fi
scale=() # the config is for two ranks; every further one needs a row of its own
if ((ranks > 2)); then
    scale=(training.global_batch_size="$ranks")
fi
bash launch/single_node.sh configs/quickstart.yaml "${scale[@]}" "$@"

headline "4/6 Export: Hugging Face layout"
nextlat export --checkpoint "$run/checkpoints" --output "$run/export"

headline "5/6 Self-speculative decoding on held-out prompts, calibrated on others"
nextlat calibrate --export "$run/export" --prompts "$run/prompts" --skip 12 --prompts-per-domain 6 \
    --temperature 0,1 --batch-size 1,8 --max-new-tokens 64
nextlat evaluate speculative --export "$run/export" --prompts "$run/prompts" \
    --draft-length 0..6,adaptive --prompts-per-domain 4 --max-new-tokens 96 --json "$run/speculative.json" --pictures "$run"

headline "6/6 Report"
nextlat report --run "$run"

headline "Done: $run/report.md, $run/report.json, the model in $run/export"

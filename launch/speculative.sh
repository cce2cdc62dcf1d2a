#!/usr/bin/env bash
# What self-speculative decoding gains on a model that was trained long enough to judge it by: sets up, trains
# configs/speculative.yaml and, to compare with, configs/speculative_mtp.yaml on the text of the Python standard library,
# exports and calibrates both, and measures them, every fixed draft length and transformers' own generate. About an hour
# and a half of training and three quarters of an hour of measuring on two quiet CPU cores, once everything is installed.
#
# Usage: bash launch/speculative.sh [key=value …]
#   key=value   handed to both `nextlat train`, for example training.train_tokens=500_000
#   NPROC=1     number of ranks (default: all GPUs, or 2 on CPU)
#
# Writes runs/speculative: nextlat/export, mtp/export, speculative.json (batch 1), speculative_batches.json (8, 32),
# speculative_batch128.json, pictures. The same command resumes with what is there: delete runs/speculative to begin again.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
source launch/processes.sh

case "${1-}" in
    -h | --help) usage && exit 0 ;;
esac
for argument in "$@"; do
    [[ "$argument" == *=* ]] || fail "speculative.sh takes key=value settings only, got $argument (--help shows the usage)"
done

sole_script
name_caller
bash launch/setup.sh
export HF_HUB_OFFLINE=1
run=runs/speculative
calibration_prompts=8 # of each domain; the others are measured

if [[ ! -f "$run/data/validation/manifest.json" ]]; then
    headline "1/5 Text, tokenizer, shards: the Python standard library's sources, vocabulary 4096"
    rm -rf "$run/data" "$run/prompts" "$run/tokenizer.model"
    nextlat-data stdlib --output "$run"
    nextlat-data tokenizer --input "$run/stdlib.jsonl" --output "$run/tokenizer.model" --vocab-size 4096
    nextlat-data shard --input "$run/stdlib.jsonl" --tokenizer "$run/tokenizer.model" --output "$run/data" \
        --split-field split --record-tokens 1024
fi
rm -rf "$run/prompts_measured" "$run/prompts_calibration"
mkdir -p "$run/prompts_measured" "$run/prompts_calibration"
for file in "$run"/prompts/*.jsonl; do
    measured=$(($(wc -l <"$file") - calibration_prompts))
    head -n "$measured" "$file" >"$run/prompts_measured/${file##*/}"
    tail -n "$calibration_prompts" "$file" >"$run/prompts_calibration/${file##*/}"
done

train_and_export() { # name config key=value …
    local name="$1" config="$2"
    shift 2
    headline "$name: training (resumes from its last checkpoint, if there is one)"
    bash launch/single_node.sh "$config" "$@"
    nextlat export --checkpoint "$run/$name/checkpoints" --output "$run/$name/export"
    nextlat calibrate --export "$run/$name/export" --prompts "$run/prompts_calibration" \
        --prompts-per-domain "$calibration_prompts"
}

headline "2/5 NextLat"
train_and_export nextlat configs/speculative.yaml "$@"
headline "3/5 MTP, to compare with"
train_and_export mtp configs/speculative_mtp.yaml "$@"

methods=(--export "nextlat=$run/nextlat/export" "mtp=$run/mtp/export" --prompts "$run/prompts_measured")
headline "4/5 Measuring: batch 1"
nextlat evaluate speculative "${methods[@]}" --draft-length 0..10,adaptive --temperature 0,0.6,1 --batch-size 1 \
    --max-new-tokens 96 --prompts-per-domain 12 --hugging-face --json "$run/speculative.json" --pictures "$run"

headline "5/5 Measuring: batch 8, 32 and 128"
nextlat evaluate speculative "${methods[@]}" --draft-length 0..5,adaptive --temperature 0,1 --batch-size 8,32 \
    --max-new-tokens 24 --prompts-per-domain 24 --json "$run/speculative_batches.json"
nextlat evaluate speculative --export "$run/nextlat/export" --prompts "$run/prompts_measured" --batch-size 128 \
    --draft-length 0,1,adaptive --temperature 0,1 --max-new-tokens 12 --prompt-tokens 32 --prompts-per-domain 24 \
    --json "$run/speculative_batch128.json"

headline "Done: $run/speculative.json, $run/speculative_batches.json, $run/speculative_batch128.json, $run/*.png"

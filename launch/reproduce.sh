#!/usr/bin/env bash
# Does predicting its own next latent state give a model a world model? Trains GPT and NextLat twins on a planning task
# (Path-Star), a state-tracking task (words in S3) and a hidden Markov process whose beliefs are known, everything but
# the objective equal, and prints both side by side. At most an hour on two CPU cores, once everything is installed.
#
# Usage: bash launch/reproduce.sh --scale cpu [--task NAME] [--seeds "0 1"] [key=value …]
#   --scale cpu   the size of the configs in configs/cpu; the paper's are in configs/paper
#   --task NAME   path_star, state_tracking or hmm only (default: all three), or path_star_field: all five objectives, by
#                 default over seeds 0..7; two hours on two cores
#   --seeds "…"   of the weights and of the order of the data: "0 1", 0..7 or 0..3,8 (default: those of the task)
#   --output DIR  where everything is written (default: runs/reproduce)
#   key=value     handed to every `nextlat train`, for example training.train_tokens=1_000_000
#   NPROC=2       data-parallel ranks (default: all GPUs, or 2 on CPU); of path_star_field how many runs at a time, each
#                 on one rank (default: 2)
#
# Writes OUTPUT/TASK: data/, a run and an export per objective and seed, report.json, pictures; logs and what each run
# scored in OUTPUT/TASK/cells. What is done for each task stands in configs/experiments. The same command resumes with what
# is there: delete the output to begin again.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
source launch/processes.sh

scale="" tasks="path_star state_tracking hmm" seeds="" root=runs/reproduce settings=()
while (($#)); do
    case "$1" in
        -h | --help) usage && exit 0 ;;
        --scale | --task | --seeds | --output)
            (($# > 1)) || fail "$1 needs a value (--help shows the usage)"
            case "$1" in
                --scale) scale="$2" ;;
                --task) tasks="$2" ;;
                --seeds) seeds="$2" ;;
                --output) root="$2" ;;
            esac
            shift 2
            ;;
        *=*) settings+=("$1") && shift ;;
        *) fail "reproduce.sh takes --scale, --task, --seeds, --output and key=value settings, got $1 (--help shows the usage)" ;;
    esac
done
[[ "$scale" == cpu ]] || fail "--scale is '${scale}'; the only one is cpu (the paper's own sizes are in configs/paper)"
for task in $tasks; do
    [[ " path_star state_tracking hmm path_star_field " == *" $task "* ]] ||
        fail "--task is $task; it must be path_star, state_tracking, hmm or path_star_field"
done
for seed in ${seeds//,/ }; do
    [[ "$seed" =~ ^[0-9]+(\.\.[0-9]+)?$ ]] || fail "--seeds has $seed; seeds are whole numbers, such as --seeds \"0 1\" or 0..7"
done
read -ra seeds <<<"${seeds//,/ }"
[[ "${NPROC-1}" =~ ^[1-9][0-9]{0,5}$ ]] || fail "NPROC is $NPROC, it must be a positive number"

name_caller
bash launch/setup.sh
export HF_HUB_OFFLINE=1
for task in $tasks; do
    headline "$task: runs that differ in their objective alone, and what they learnt"
    how=(--launcher "bash launch/single_node.sh")
    [[ "$task" != path_star_field ]] || how=(--jobs "${NPROC:-2}")
    [[ -z "${seeds[*]-}" ]] || how+=(--seeds "$(IFS=, && echo "${seeds[*]}")")
    nextlat ablate --config "configs/experiments/$task.yaml" --output "$root/$task" "${how[@]}" ${settings[@]+"${settings[@]}"}
done

headline "Done: $root/*/report.json, $root/*/*.png"

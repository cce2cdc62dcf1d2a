# shellcheck shell=bash
# What the scripts that start ranks share: they check the environment, run a launcher until the training is done, hand
# signals to its ranks, and start it again when it failed; every new start resumes from the last commit.
# Usage: source launch/ranks.sh   after launch/env.sh; the script defines
#   start_ranks         starts the launcher as the last background process
#   signal_ranks NAME   signals the ranks themselves: launchers grant them only seconds; fails when there are none
#   watch_ranks         optional: runs with the launcher, in the background
#   before_restart      optional: looks for what is left to run on; not 0: no further start
#   said_end            optional: prints what the ranks left in NEXTLAT_END_MARK, where that is on another host
#   ranks               optional, a variable: how many there will be, where that is known before they start
# Variables: MAX_RESTARTS=3 failures, RESTART_SECONDS=5 between two starts, NEXTLAT_SKIP_DOCTOR=1

# shellcheck source=launch/processes.sh
source "$ROOT/launch/processes.sh"

MAX_RESTARTS="${MAX_RESTARTS:-3}"
RESTART_SECONDS="${RESTART_SECONDS:-5}"
[[ "$MAX_RESTARTS" =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS is $MAX_RESTARTS, it must be a number of restarts, 0 for none"
[[ "$RESTART_SECONDS" =~ ^[0-9]+$ ]] || fail "RESTART_SECONDS is $RESTART_SECONDS, it must be a whole number of seconds"

SAVED=75 # of a rank: asked to stop, it saved a checkpoint; the same command resumes from there
MISTAKE=2
INTERRUPTED=130
KILLED=137
asked_to_stop="" # the signal that this script got
launcher="" # also the process group of all that it starts on this host
watcher=""
guard=""

files="$(mktemp -d)"
trap 'rm -rf "$files"' EXIT
# Told to the ranks; see nextlat_dist/training/health/launcher.py and checkpoint/run_lock.py.
read_start $$ || fail "this system has no /proc: the launch scripts need Linux"
script_started="$started"
export NEXTLAT_LAUNCH="${HOSTNAME:-host}-$$-$script_started" # this run, over all its starts
export NEXTLAT_LAUNCHER="$$:$script_started"
export NEXTLAT_END_MARK="$files/end"

# `--doctor` as the first argument runs the doctor instead of the training; true when it was there.
choose_command() {
    command=train
    [[ "${1-}" == --doctor ]] || return 1
    command=doctor
}

# check_environment CONFIG [key=value | option …]: the quick checks, which wait for nothing.
check_environment() {
    [[ "$command" == train ]] || return 0
    if [[ -n "${NEXTLAT_SKIP_DOCTOR-}" ]]; then
        # The doctor would say whether these ranks leave an end mark: all do that are told where.
        [[ "${NEXTLAT_END_MARK@a}" != *x* ]] || : >"$files/expected"
        return 0
    fi
    local status=0 config="$1" argument settings=()
    shift
    for argument in "$@"; do
        [[ "$argument" == -* ]] || settings+=("$argument")
    done
    WORLD_SIZE="${ranks:-1}" "$VENV/bin/python" -m nextlat_dist.cli doctor --quick --config "$config" ${settings[@]+"${settings[@]}"} || status=$?
    [[ ! -e "$NEXTLAT_END_MARK" ]] || mv "$NEXTLAT_END_MARK" "$files/expected"
    [[ $status -ne 1 ]] || echo "(NEXTLAT_SKIP_DOCTOR=1 starts all the same)" >&2
    [[ $status -eq 0 ]] || exit 2
}

ask_to_stop() {
    asked_to_stop="$1"
    # Ranks that are not there yet cannot save: end what would start them.
    [[ -z "$launcher" ]] || signal_ranks "$1" || end_launcher
}

# What is left of the launcher on this host, be it killed or not: nothing of it may run next to another start. Not
# SIGTERM, on which DeepSpeed's runner ends every launcher on the other hosts, also those of other runs. pdsh's connections
# are in process groups of their own: they outlive it, and so would the ranks that they hold.
end_launcher() {
    local tries left connections="^([^ ]*/)?(pdsh|ssh) "
    kill -KILL -- "-$launcher" 2>/dev/null || true
    for ((tries = 0; tries < 100; tries++)); do
        mapfile -t left < <(launchers_like "$connections" "NEXTLAT_LAUNCH=$NEXTLAT_LAUNCH")
        ((${#left[@]} == 0)) || kill -KILL "${left[@]}" 2>/dev/null || true
        ((${#left[@]})) || kill -0 -- "-$launcher" 2>/dev/null || return 0
        sleep 0.1 >/dev/null 2>&1
    done
}

script_lives() { read_start $$ && [[ "$started" == "$script_started" ]]; }

# Ends what was launched when this script is killed, which it cannot do itself any more; asks this script to stop when the
# one that started it was killed.
guard_launcher() {
    local asked=""
    trap - EXIT
    while kill -0 -- "-$launcher" 2>/dev/null; do
        if ! script_lives; then
            [[ -z "$watcher" ]] || kill "$watcher" 2>/dev/null || true
            end_launcher
            rm -rf "$files"
            return
        elif [[ -z "$asked" ]] && ! caller_lives; then
            asked=1
            echo "the script that started this one was killed: the ranks save and stop" >&2
            kill -TERM $$ 2>/dev/null || true
        fi
        sleep 1 >/dev/null 2>&1
    done
}

# Process groups of their own: a signal for this script's whole group must reach neither the launcher nor the guard, and
# background processes of a shell without job control ignore interrupts.
start_launcher() {
    rm -f "$NEXTLAT_END_MARK"
    set -m
    start_ranks
    launcher=$!
    set +m
    watcher=""
    if declare -F watch_ranks >/dev/null; then
        watch_ranks &
        watcher=$!
    fi
    set -m
    guard_launcher &
    guard=$!
    set +m
}

wait_for_launcher() { # sets status
    while kill -0 "$launcher" 2>/dev/null; do
        wait "$launcher" || true # a signal ends the wait, not the launcher
    done
    status=0
    wait "$launcher" || status=$?
    [[ -z "$watcher" ]] || kill "$watcher" 2>/dev/null || true # first: its own connections are no host's silence
    end_launcher
    launcher=""
    kill "$guard" 2>/dev/null || true
}

# How the run ended, as its ranks said; empty where none of them began. A script may define its own.
declare -F said_end >/dev/null || said_end() { cat "$NEXTLAT_END_MARK" 2>/dev/null || true; }

# A launcher of which a part was killed may end with 0, and its ranks train on until they notice. Only the ranks know.
believe_ranks() { # changes status
    [[ "$command" == train ]] || return 0
    local said
    if [[ $status -eq 0 ]]; then
        said="$(said_end)"
        if [[ "$said" =~ ^[0-9]+$ ]]; then
            status="$said"
        elif [[ -n "$said" || -e "$files/expected" ]]; then
            echo "the launcher ended, but no rank said that the run did: a process of it was killed" >&2
            status=$KILLED
        fi
    elif [[ $status -ge 128 && -n "$asked_to_stop" && -z "$(said_end)" ]]; then
        status=$SAVED # nothing had begun: the same command begins
    fi
}

# train_until_done here|elsewhere: runs the launcher until it ends well, is asked to stop, or failed once more than
# MAX_RESTARTS; returns its last exit code. A run that saved and stopped resumes here, or is left to the caller.
train_until_done() {
    local restarts=0 status
    trap 'ask_to_stop INT' INT
    trap 'ask_to_stop TERM' TERM HUP
    trap 'ask_to_stop USR1' USR1
    while true; do
        start_launcher
        wait_for_launcher
        believe_ranks
        if [[ "$asked_to_stop" == INT ]]; then
            return "$INTERRUPTED"
        elif [[ $status -eq 0 || $status -eq $MISTAKE || $status -eq $INTERRUPTED ]]; then
            return "$status"
        elif [[ -n "$asked_to_stop" || "$command" == doctor ]]; then
            return "$status"
        elif ((status == SAVED)); then
            [[ "$1" == here ]] || return "$status"
            echo "the ranks saved a checkpoint and stopped: starting again from it" >&2
        elif ((restarts == MAX_RESTARTS)); then
            echo "the ranks failed with exit code $status, after $restarts restarts: giving up (MAX_RESTARTS=$MAX_RESTARTS)" >&2
            return "$status"
        else
            restarts=$((restarts + 1))
            echo "the ranks failed with exit code $status: restart $restarts of at most $MAX_RESTARTS, from the last checkpoint" >&2
        fi
        sleep "$RESTART_SECONDS" & # as a job, so that a signal ends the wait for it
        wait $! || true
        [[ -z "$asked_to_stop" ]] || return "$status"
        ! declare -F before_restart >/dev/null || before_restart || return "$status"
    done
}

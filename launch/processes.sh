# shellcheck shell=bash
# Processes by parent and by command line, read from /proc: slim images have no pgrep and no pkill.
# Usage: source launch/processes.sh

# children_of PID…: ids of the children, a line each; fails when there are none.
children_of() {
    local stat line parent wanted=" $* " none=1
    for stat in /proc/[0-9]*/stat; do
        { read -r line <"$stat"; } 2>/dev/null || continue # it ended meanwhile
        line="${line##*) }" # what precedes holds the name, which may hold anything
        parent="${line#* }"
        [[ "$wanted" == *" ${parent%% *} "* ]] || continue
        stat="${stat%/stat}"
        echo "${stat##*/}"
        none=0
    done
    return "$none"
}

command_line() { # of PID, a blank after each word
    local words=()
    { mapfile -d '' words <"/proc/$1/cmdline"; } 2>/dev/null || true
    echo "${words[*]} "
}

# processes_like REGEX: ids of all processes whose command line it matches, a line each; fails when there are none.
processes_like() {
    local folder words none=1
    for folder in /proc/[0-9]*; do # no subshell for each: a signal must reach all ranks at nearly the same time
        words=()
        { mapfile -d '' words <"$folder/cmdline"; } 2>/dev/null || continue # it ended meanwhile
        [[ "${words[*]} " =~ $1 ]] || continue
        echo "${folder##*/}"
        none=0
    done
    return "$none"
}

# launchers_like REGEX NAME=VALUE: those of processes_like that have the setting in their environment.
launchers_like() {
    local process none=1
    for process in $(processes_like "$1"); do
        has_setting "$process" "$2" || continue
        echo "$process"
        none=0
    done
    return "$none"
}

# signal_children NAME PID…: fails when there are none.
signal_children() {
    local name="$1" children
    shift
    mapfile -t children < <(children_of "$@")
    ((${#children[@]})) && kill "-$name" "${children[@]}"
}

# read_start PID: sets started to the moment it began, which with the id is one process; fails when there is none.
read_start() {
    local line fields
    started=""
    { read -r line <"/proc/$1/stat"; } 2>/dev/null || return 1
    read -ra fields <<<"${line##*) }"
    [[ "${fields[0]}" != [ZX] ]] || return 1
    # shellcheck disable=SC2034  # the caller's
    started="${fields[19]}"
}

# has_setting PID NAME=VALUE: whether its environment has that.
has_setting() {
    local settings=() setting
    { mapfile -d '' settings <"/proc/$1/environ"; } 2>/dev/null || return 1
    for setting in "${settings[@]}"; do
        [[ "$setting" != "$2" ]] || return 0
    done
    return 1
}

# name_caller: the launch scripts that this script starts, or what it starts does, have their ranks save and stop when this
# script is gone, however it ended.
name_caller() {
    local started
    ! read_start $$ || export NEXTLAT_CALLER="$$:$started"
}

caller_lives() { # also where none is named
    local started
    [[ -z "${NEXTLAT_CALLER-}" ]] || { read_start "${NEXTLAT_CALLER%%:*}" && [[ "$started" == "${NEXTLAT_CALLER#*:}" ]]; }
}

#!/usr/bin/env bash
# Reads a hostfile, as launch/multi_node.sh and `nextlat doctor` do, and prints it as DeepSpeed's launcher reads it: a line
# `HOST slots=N` per host, without comments. What is no hostfile gets one sentence and exit code 2.
#
# Usage: bash launch/hostfile.sh HOSTFILE
#   HOSTFILE   a line `[USER@]HOST slots=N` per host, N ranks on it; `#` begins a comment; `max_slots=N`, as OpenMPI's
#              files have it, is ignored; a byte order mark and Windows' line ends do not matter

set -euo pipefail

refuse() {
    echo "error: $*" >&2
    exit 2
}

case "${1-}" in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit 0 ;;
    "") refuse "no HOSTFILE given: name a file with a line 'HOST slots=N' per host" ;;
esac
file="$1"
[[ -f "$file" && -r "$file" ]] || refuse "cannot read the hostfile $file: it is not a file that can be read; name one with a line 'HOST slots=N' per host"

blank=$'[ \t]'
# pdsh would take a range, a pattern or an exclusion for several hosts, ssh a leading dash for an option.
host="([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.-]*"
number=0 lines=() seen=" "
while IFS= read -r line || [[ -n "$line" ]]; do
    number=$((number + 1))
    [[ $number -gt 1 ]] || line="${line#$'\xef\xbb\xbf'}"
    text="${line%$'\r'}"
    text="${text%%#*}"
    text="${text#"${text%%[!$' \t']*}"}"
    text="${text%"${text##*[!$' \t']}"}"
    [[ -n "$text" ]] || continue
    where="line $number of $file is '$(printf %s "$text" | tr -c '[:print:]' '?')'"
    [[ "$text" =~ ^([^ $'\t']+)$blank+slots=([1-9][0-9]{0,5})($blank+max_slots=[0-9]+)?$ ]] ||
        refuse "$where; every line must read 'HOST slots=N', each host once"
    name="${BASH_REMATCH[1]}" slots="${BASH_REMATCH[2]}"
    [[ "$name" =~ ^$host$ ]] ||
        refuse "$where; a host is a name or an IPv4 address, [USER@]HOST of letters, digits, '.', '_' and '-': give ports, IPv6 addresses and the like a name in ~/.ssh/config"
    [[ "$seen" != *" $name "* ]] || refuse "$where; every line must read 'HOST slots=N', each host once, and $name comes twice"
    seen+="$name "
    lines+=("$name slots=$slots")
done <"$file"
((${#lines[@]})) || refuse "the hostfile $file names no host: add a line 'HOST slots=N' per host"
printf '%s\n' "${lines[@]}"

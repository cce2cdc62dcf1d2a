#!/usr/bin/env bash
# Two hosts on one machine, each with its own network, processes, name, shared memory and sshd, joined by a cable; a
# command runs on the first. The file system is shared, as a cluster's would be.
#
# Usage: unshare --mount --net --pid --fork --kill-child --mount-proc bash two_hosts.sh DIRECTORY COMMAND…
#   DIRECTORY   takes keys and logs; a file DIRECTORY/power_off_NAME ends host NAME like a pulled plug
#
# Hosts alpha (10.77.0.1) and beta (10.77.0.2). Nothing outside the caller's namespaces changes, and all ends with it.

set -euo pipefail
directory="$1"
shift
mount -t tmpfs none /run
mkdir -p /run/sshd /run/netns

ssh-keygen -q -t ed25519 -N '' -f "$directory/key"
cat >"$directory/ssh_config" <<CONFIG
Host *
    IdentityFile $directory/key
    UserKnownHostsFile $directory/known_hosts
    StrictHostKeyChecking yes
CONFIG
printf '127.0.0.1 localhost\n10.77.0.1 alpha\n10.77.0.2 beta\n' >"$directory/etc_hosts"
mount --bind "$directory/ssh_config" /etc/ssh/ssh_config
mount --bind "$directory/etc_hosts" /etc/hosts

number=0
for name in alpha beta; do
    number=$((number + 1))
    ssh-keygen -q -t ed25519 -N '' -f "$directory/host_key_$name"
    echo "$name,10.77.0.$number $(<"$directory/host_key_$name.pub")" >>"$directory/known_hosts"
    cat >"$directory/sshd_$name" <<CONFIG
ListenAddress 10.77.0.$number
HostKey $directory/host_key_$name
AuthorizedKeysFile $directory/key.pub
PidFile none
StrictModes no
PasswordAuthentication no
UsePAM no
CONFIG
    ip netns add "$name"
done
ip link add eth0 netns alpha type veth peer name eth0 netns beta
number=0
for name in alpha beta; do
    number=$((number + 1))
    ip -n "$name" link set lo up
    ip -n "$name" addr add "10.77.0.$number/24" dev eth0
    ip -n "$name" link set eth0 up
done

# on NAME COMMAND…: in the host's namespaces; COMMAND is its first process, and all others end with it.
on() {
    local name="$1"
    shift
    # shellcheck disable=SC2016  # the variables are the inner shell's
    exec nsenter --net="/run/netns/$name" unshare --mount --uts --pid --fork --kill-child --mount-proc \
        bash -c 'hostname "$0" && mount -t tmpfs none /dev/shm && exec "$@"' "$name" "$@"
}

on beta /usr/sbin/sshd -D -f "$directory/sshd_beta" -E "$directory/sshd_beta.log" &
beta=$!
(
    until [[ -e "$directory/power_off_beta" ]]; do sleep 0.2; done
    ip -n beta link set eth0 down # first the cable: a dying process must not say goodbye
    kill -KILL "$beta" # and with it, all of the host
) &
# shellcheck disable=SC2016  # the same
on alpha bash -c '
    /usr/sbin/sshd -f "$0/sshd_alpha" -E "$0/sshd_alpha.log"
    until ssh beta true 2>/dev/null && ssh alpha true 2>/dev/null; do sleep 0.2; done
    "$@"' "$directory" "$@"

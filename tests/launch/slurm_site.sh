#!/usr/bin/env bash
# A Slurm cluster of one node on this machine: munge, a controller and a node's daemon; a command runs next to them.
#
# Usage: unshare --mount --net --uts --pid --fork --kill-child --mount-proc bash slurm_site.sh DIRECTORY COMMAND…
#   DIRECTORY   takes the configuration, state and logs
#
# Nothing outside the caller's namespaces changes, and all ends with it.

set -euo pipefail
directory="$1"
shift
hostname node0
ip link set lo up
# With nothing but a loopback, Slurm finds no address to listen at.
ip link add eth0 type veth peer name eth1
ip addr add 10.78.0.1/24 dev eth0
ip link set eth0 up
ip link set eth1 up
printf '127.0.0.1 localhost\n10.78.0.1 node0\n' >"$directory/etc_hosts"
mount --bind "$directory/etc_hosts" /etc/hosts
mount -t tmpfs none /run

mkdir -m 755 "$directory/munge" "$directory/state" "$directory/spool"
(umask 077 && head -c 128 /dev/urandom >"$directory/munge/key")
munged --force --key-file="$directory/munge/key" --socket="$directory/munge/socket" --pid-file="$directory/munge/pid" \
    --log-file="$directory/munge/log" --seed-file="$directory/munge/seed"

# A job that is requeued waits until its credentials have expired: two minutes, if not told otherwise.
cat >"$directory/slurm.conf" <<CONFIG
ClusterName=site
SlurmctldHost=node0
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$directory/munge/socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd.pid
SlurmctldLogFile=$directory/slurmctld.log
SlurmdLogFile=$directory/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=10
MinJobAge=300
SchedulerParameters=sched_interval=2
NodeName=node0 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONFIG
export SLURM_CONF="$directory/slurm.conf"
slurmctld
slurmd
for ((tries = 0; ; tries++)); do
    [[ "$(timeout 5 sinfo --noheader --format=%t 2>/dev/null)" != idle ]] || break
    ((tries < 100)) || { tail -n 5 "$directory"/*.log && exit 1; }
    sleep 0.2
done
"$@"

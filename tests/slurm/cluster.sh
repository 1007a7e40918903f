#!/bin/bash
# A real SLURM on this host, with virtual nodes of 4 CPUs each: cluster.sh up FOLDER [NODES [PORT]], then export
# SLURM_CONF=FOLDER/slurm.conf; cluster.sh down FOLDER ends it. Needs Debian's slurm-wlm and munge, and root: jax finds its
# coordinator by a node's name, so the names go into /etc/hosts meanwhile.
set -euo pipefail
command=$1 state=$(realpath -m "$2") nodes=${3:-2} port=${4:-16817} host=$(hostname)
mark="# jax_ep slurm test ${state}"

down() {
  for file in "$state"/slurmd.*.pid "$state/slurmctld.pid" "$state/munged.pid"; do
    if [ -f "$file" ]; then kill "$(cat "$file")" 2>/dev/null || true; fi
  done
  grep -vF "$mark" /etc/hosts >"$state/hosts" || true
  cat "$state/hosts" >/etc/hosts # in place: a container mounts the file
}

up() {
  mkdir -p "$state/slurmctld"
  names=$(seq -f 'n%g' -s ' ' "$nodes")
  cat >"$state/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.%n.pid
SlurmdSpoolDir=$state/spool.%n
StateSaveLocation=$state/slurmctld
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.%n.log
SlurmdParameters=config_overrides
KillWait=5
CONF
  local i=0
  for name in $names; do
    i=$((i + 1))
    mkdir -p "$state/spool.$name"
    echo "NodeName=$name NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=4 Boards=1 SocketsPerBoard=1" \
      "CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000" >>"$state/slurm.conf"
  done
  echo "PartitionName=debug Nodes=${names// /,} Default=YES MaxTime=INFINITE State=UP" >>"$state/slurm.conf"
  printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$state/cgroup.conf"
  echo "127.0.0.1 $names $mark" >>/etc/hosts
  if ! pgrep -x munged >/dev/null; then
    mkdir -p /run/munge
    chown munge:munge /run/munge
    chmod 755 /run/munge
    runuser -u munge -- /usr/sbin/munged
    cp /run/munge/munged.pid "$state/munged.pid"
  fi
  export SLURM_CONF=$state/slurm.conf
  /usr/sbin/slurmctld
  for name in $names; do /usr/sbin/slurmd -N "$name"; done
  for _ in $(seq 100); do
    if [ "$(sinfo -h -N -t idle 2>/dev/null | wc -l)" = "$nodes" ]; then return; fi
    sleep 0.2
  done
  echo "SLURM's nodes did not come up:" >&2
  tail -n 20 "$state"/*.log >&2
  down
  exit 1
}

"$command"

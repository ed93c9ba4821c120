#!/usr/bin/env bash
# A real Slurm of four nodes n1 to n4 on this machine: bash tests/slurm/up.sh FOLDER; then
#   export SLURM_CONF=FOLDER/slurm.conf
# Installs Debian's packages where they are missing, which needs root, as the daemons do. Exit code 3,
# and the reason as the last line, where it cannot run here. Take it down with down.sh.
set -euo pipefail
folder=${1:?a folder for configuration, state and logs}
here=$(dirname "$(readlink -f "$0")")
cannot() {
    echo "no Slurm here: $*"
    exit 3
}

[ "$(id -u)" = 0 ] || cannot "its daemons need root"
if ! { command -v slurmctld && command -v slurmd && command -v munged; } >/dev/null; then
    command -v apt-get >/dev/null || cannot "it is not installed, and there is no apt-get"
    export DEBIAN_FRONTEND=noninteractive
    packages=(slurm-wlm slurmctld slurmd slurm-client munge)
    install=(timeout 300 apt-get install -y -qq --no-install-recommends "${packages[@]}")
    "${install[@]}" >/dev/null 2>&1 || {
        timeout 120 apt-get update -qq >/dev/null 2>&1 || true
        "${install[@]}" >/dev/null 2>&1 || cannot "apt-get cannot install ${packages[*]}"
    }
fi
port=${MPICDSGD_SLURM_PORT:-17000}
if (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
    cannot "port $port is in use; MPICDSGD_SLURM_PORT=N takes another"
fi

mkdir -p "$folder"/{state,log,spool/n1,spool/n2,spool/n3,spool/n4}
folder=$(readlink -f "$folder")
sed -e "s|@FOLDER@|$folder|g" -e "s|@HOST@|$(hostname -s)|g" -e "s|@PORT@|$port|g" \
    -e "s|@PORTS@|$((port + 1))-$((port + 4))|g" "$here/slurm.conf.in" >"$folder/slurm.conf"
export SLURM_CONF=$folder/slurm.conf
if ! munge -n >/dev/null 2>&1; then
    mkdir -p /run/munge /var/log/munge
    chown munge:munge /run/munge /var/log/munge
    setpriv --reuid=munge --regid=munge --clear-groups munged || cannot "munged does not start"
    touch "$folder/own-munged"
fi
slurmctld || cannot "slurmctld does not start, see $folder/log"
for node in n1 n2 n3 n4; do
    slurmd -N "$node" || cannot "slurmd of $node does not start, see $folder/log"
done
for _ in $(seq 100); do
    [ "$(sinfo -h -p main -t idle -o %D 2>/dev/null)" = 4 ] && exit 0
    sleep 0.2
done
bash "$here/down.sh" "$folder" >&2 || true
cannot "the nodes do not become idle, see $folder/log"

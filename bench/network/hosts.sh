#!/usr/bin/env bash
# Hosts on one machine: network namespaces on a bridge, with links of RATE both ways. Needs root.
#     hosts.sh up N RATE             makes host1 to hostN
#     hosts.sh mpiexec N COMMAND...  runs COMMAND on the first N, a rank on each
#     hosts.sh down                  ends what runs there and removes them
#     hosts.sh [options] HOST COMMAND...  as ssh would: for mpiexec, which starts its own that way
# MPICDSGD_HOSTS: a folder of their own, whose name is in their names. MPIEXEC: default from PATH.
set -euo pipefail

folder=${MPICDSGD_HOSTS:?a folder for the hosts}
name=$(basename "$folder")
subnet=10.98.0

# shape NAMESPACE DEVICE RATE: what leaves by it. A queue of 200 ms, as a switch may have.
shape() {
    ip netns exec "$1" tc qdisc replace dev "$2" root tbf rate "$3" burst 64kb latency 200ms
}

up() {
    local count=$1 rate=$2 i host
    mkdir -p "$folder"
    echo "127.0.0.1 localhost" >"$folder/hosts"
    ip netns add "$name-switch"
    ip -n "$name-switch" link add bridge type bridge
    ip -n "$name-switch" link set bridge up
    for i in $(seq "$count"); do
        host=$name-host$i
        ip netns add "$host"
        ip -n "$host" link set lo up
        ip link add e0 netns "$host" type veth peer name "port$i" netns "$name-switch"
        ip -n "$host" addr add "$subnet.$i/24" dev e0
        ip -n "$host" link set e0 up
        ip -n "$name-switch" link set "port$i" master bridge up
        shape "$host" e0 "$rate"
        shape "$name-switch" "port$i" "$rate"
        # The machine's may be bbr, which probes; reno is the one that every namespace may choose.
        ip netns exec "$host" sh -c "echo reno >/proc/sys/net/ipv4/tcp_congestion_control"
        echo "$subnet.$i host$i" >>"$folder/hosts"
    done
}

down() {
    local space
    for space in $(ip netns list | cut -d ' ' -f 1 | grep "^$name-" || true); do
        ip netns pids "$space" | xargs --no-run-if-empty kill -KILL || true
        ip netns delete "$space"
    done
    rm -f "$folder/hosts"
}

# enter HOST COMMAND...: with its network, its name and its /etc/hosts. UCX looks for devices in /sys;
# who asks for other names is told at once that there are none.
enter() {
    local host=$1
    shift
    # shellcheck disable=SC2016 # the inner shell's
    exec nsenter --net="/run/netns/$name-$host" unshare --uts --mount sh -ec '
        hostname "$1"
        mount --bind "$2" /etc/hosts
        mount --bind /dev/null /etc/resolv.conf
        mount -t sysfs none /sys
        shift 2
        exec "$@"' sh "$host" "$folder/hosts" "$@"
}

start() {
    local count=$1 mpiexec=${MPIEXEC:-mpiexec} itself hosts
    shift
    itself=$(realpath "$0")
    if [ "$(grep -c host "$folder/hosts")" -le "$count" ]; then
        echo "there are no $count hosts" >&2
        exit 2
    fi
    if "$mpiexec" --version | grep -q "Open MPI\|OpenRTE"; then
        hosts=$(seq -s , -f "host%g:1" "$count")
        enter host1 "$mpiexec" --allow-run-as-root --bind-to none -n "$count" --host "$hosts" \
            --prtemca plm ssh --prtemca plm_ssh_agent "$itself" \
            --prtemca prte_if_include "$subnet.0/24" --mca pml ob1 --mca btl tcp,self \
            --mca btl_tcp_if_include "$subnet.0/24" "$@"
    fi
    hosts=$(seq -s , -f "host%g" "$count")
    export UCX_TLS=tcp,self UCX_NET_DEVICES=e0
    enter host1 "$mpiexec" -launcher ssh -launcher-exec "$itself" -iface e0 -ppn 1 \
        -n "$count" -hosts "$hosts" "$@"
}

case ${1:-} in
up) up "$2" "$3" ;;
down) down ;;
mpiexec) start "${@:2}" ;;
*)
    while [[ ${1:-} == -* ]]; do shift; done
    host=${1:?a host}
    shift
    enter "$host" sh -c "$*"
    ;;
esac

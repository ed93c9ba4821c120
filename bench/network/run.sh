#!/usr/bin/env bash
# A training step of ours, of DDP and of a parameter server on 4 and 8 hosts with links of 100 Mbit/s:
#     bash bench/network/run.sh [--quick] [--out FILE] [options of run.py]
# The hosts are network namespaces of this machine (hosts.sh) and gone when it ends; needs root.
# PYTHON: one that has the package. RATE: of the links, as tc writes it. LIMIT_S: seconds in all.
set -euo pipefail

here=$(realpath "$(dirname "$0")")
rate=${RATE:-100mbit}
limit=${LIMIT_S:-1500}
most=8

needs() {
    echo "bench/network/run.sh needs $1" >&2
    exit 2
}
for tool in ip tc nsenter unshare hostname setsid; do
    command -v "$tool" >/dev/null || needs "$tool (iproute2, util-linux, hostname)"
done
[ "$(id -u)" -eq 0 ] || needs "root: it makes network namespaces"
python=$(command -v "${PYTHON:-python3}") || needs "Python: PYTHON=${PYTHON:-python3} is none"
why=$("$python" -c "import mpi4py, torch, mpicdsgd" 2>&1) ||
    needs "a Python with the package (PYTHON=): $(tail -n 1 <<<"$why")"
MPIEXEC=$(dirname "$python")/mpiexec
[ -x "$MPIEXEC" ] || MPIEXEC=$(command -v mpiexec) || needs "mpiexec: pip install mpich"
MPICDSGD_HOSTS=$(mktemp -d "${TMPDIR:-/tmp}/mpicdsgd-hosts.XXXXXX")
export MPIEXEC MPICDSGD_HOSTS
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONUNBUFFERED=1
export TORCH_CPP_LOG_LEVEL=ERROR # else it warns that there is no name server

job=
# shellcheck disable=SC2317,SC2329 # called by the trap
tear_down() {
    trap - EXIT
    trap "" INT TERM
    if [ -n "$job" ]; then kill -TERM -- "-$job" 2>/dev/null || true; fi
    bash "$here/hosts.sh" down
    rm -rf "$MPICDSGD_HOSTS"
}
trap tear_down EXIT
trap "exit 130" INT
trap "exit 143" TERM

why=$(bash "$here/hosts.sh" up "$most" "$rate" 2>&1) ||
    needs "network namespaces with shaped links: $(tail -n 1 <<<"$why")"
# In a group of its own, so that all of it can be ended, and waited for, so that a trap acts at once.
setsid timeout --kill-after=10 "$limit" "$python" "$here/run.py" \
    --launcher "bash $here/hosts.sh mpiexec {n}" \
    --network "network namespaces on one machine, links of $rate both ways (tbf), TCP reno" \
    "$@" &
job=$!
code=0
wait "$job" || code=$?
job=
if [ "$code" -eq 124 ]; then echo "stopped after LIMIT_S=$limit seconds" >&2; fi
exit "$code"

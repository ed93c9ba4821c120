#!/usr/bin/env bash
# Takes down what up.sh started: bash tests/slurm/down.sh FOLDER. Cancels all jobs and waits for an
# empty queue first, as daemons that are taken away leave ranks behind.
set -euo pipefail
folder=$(readlink -f "${1:?the folder given to up.sh}")
export SLURM_CONF=$folder/slurm.conf
scancel --user=root 2>/dev/null || true
for _ in $(seq 120); do
    [ -z "$(squeue -h 2>/dev/null)" ] && break
    sleep 0.5
done
squeue -h || true
for file in "$folder"/log/n?.pid "$folder"/log/ctld.pid; do
    [ -f "$file" ] && kill "$(cat "$file")" 2>/dev/null || true
done
for _ in $(seq 50); do
    alive=0
    for file in "$folder"/log/*.pid; do
        [ -f "$file" ] && kill -0 "$(cat "$file")" 2>/dev/null && alive=1
    done
    [ "$alive" = 0 ] && break
    sleep 0.2
done
if [ -f "$folder/own-munged" ] && [ -f /run/munge/munged.pid ]; then
    kill "$(cat /run/munge/munged.pid)" 2>/dev/null || true
fi

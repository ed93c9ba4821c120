#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them all: bash tests/run.sh [pytest options]
# MPICDSGD_DATA=FOLDER adds the tests on real data (FOLDER/mnist: the four idx files).
# MPICDSGD_OPENMPI=FOLDER adds those of ranks that die, with Open MPI made there (tests/openmpi.py).
set -euo pipefail
cd "$(dirname "$0")/.."
source jobs/venv.sh mpich,demo,dev
export OMP_NUM_THREADS=1 # several ranks share few cores

ruff check .
ruff format --check .
mypy
shellcheck jobs/*.sh jobs/*.sbatch tests/*.sh tests/slurm/*.sh bench/*.sh bench/*/*.sh .ci/run

unit=$(mktemp)
trap 'rm -f "$unit"; kill "$!" 2>/dev/null || true' EXIT
python -m pytest tests/unit "$@" >"$unit" 2>&1 & # beside few ranks: one core would idle
for ranks in 1 2 4 5; do
    echo "== MPI tests on $ranks ranks"
    timeout 1200 mpiexec -n "$ranks" python -m pytest tests/mpi "$@"
    if [ "$ranks" = 2 ]; then
        echo "== unit tests"
        code=0
        wait "$!" || code=$?
        cat "$unit"
        [ "$code" = 0 ] || exit "$code"
    fi
done
python -m pytest tests/jobs "$@"
echo "== batch jobs on a Slurm of this machine"
timeout 900 python -m pytest tests/slurm "$@"

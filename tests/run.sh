#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them: bash tests/run.sh [pytest options]
# --full runs all of them: the long ones, and the MPI tests on any number of ranks.
# MPICDSGD_DATA=FOLDER adds the tests on real data (FOLDER/mnist: the four idx files).
# MPICDSGD_OPENMPI=FOLDER adds those of ranks that die, with Open MPI made there (tests/openmpi.py).
set -euo pipefail
cd "$(dirname "$0")/.."
source jobs/venv.sh mpich,demo,dev
export OMP_NUM_THREADS=1 # several ranks share few cores
# Ranks that wait sleep instead of taking the core from the one that they wait for.
export MPIR_CVAR_CH4_PROGRESS_THROTTLE=1 MPIR_CVAR_CH4_PROGRESS_THROTTLE_NO_PROGRESS_COUNT=30

# In memory, where there is room: what writes checkpoints waits most of its time for the disk.
if [ "$(df --output=avail /dev/shm 2>/dev/null | tail -n1)" -gt 4000000 ] 2>/dev/null; then
    TMPDIR=$(mktemp -d /dev/shm/mpicdsgd-tests.XXXXXX)
else
    TMPDIR=$(mktemp -d)
fi
export TMPDIR
lanes=()
clean() {
    # INT, so that pytest takes the Slurm down.
    for lane in "${lanes[@]}"; do kill -INT -- "-$lane" 2>/dev/null || true; done
    for lane in "${lanes[@]}"; do wait "$lane" 2>/dev/null || true; done
    rm -rf "$TMPDIR"
}
trap clean EXIT

# Two lanes side by side, as tests of few ranks leave a core idle and batch jobs mostly wait. The
# output of the first comes at the end.
all_but_mpi() {
    ruff check . && ruff format --check . && mypy &&
        shellcheck jobs/*.sh jobs/*.sbatch tests/*.sh tests/slurm/*.sh bench/*.sh bench/*/*.sh .ci/run &&
        echo "== unit tests" && python -m pytest tests/unit "$@" &&
        echo "== whole jobs" && python -m pytest tests/jobs "$@" &&
        echo "== batch jobs on a Slurm of this machine" && python -m pytest tests/slurm "$@"
}
set -m # it has a process group, and hears SIGINT
all_but_mpi "$@" >"$TMPDIR/all_but_mpi" 2>&1 &
lanes+=($!)
set +m

failed=()
for ranks in 1 2 4 5; do
    echo "== MPI tests on $ranks ranks"
    mpiexec -n "$ranks" python -m pytest tests/mpi "$@" ||
        failed+=("MPI tests on $ranks ranks")
done
wait "${lanes[0]}" || failed+=("lint, unit tests, whole jobs or batch jobs")
cat "$TMPDIR/all_but_mpi"
lanes=()
for what in "${failed[@]}"; do echo "failed: $what"; done
[ "${#failed[@]}" = 0 ]

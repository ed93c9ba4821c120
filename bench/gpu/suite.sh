#!/usr/bin/env bash
# Builds the package, runs the tests marked gpu on 1, 2 and 4 ranks, then the GPU benches; one table:
#     bash bench/gpu/suite.sh [FOLDER]    FOLDER: wheels of what is missing, an MPI library say
# OUT_DIR takes records and log (bench/results). PYTHON, MPICDSGD_DATA, CIFAR10 (folder), DEADLINE_S.
#
# Nothing is downloaded, and nothing stays but OUT_DIR and, without a GPU, a compiled shim in TMPDIR.
# Without a GPU the same tests are skipped and the benches run on an emulated one, to try the suite.
set -euo pipefail

if [ -n "${1:-}" ] && ! compgen -G "$1/*.whl" >/dev/null; then
    echo "no wheels in $1: name a folder with what is missing here, an MPI library say" >&2
    exit 2
fi
if ! [[ ${DEADLINE_S:=470} =~ ^[0-9]+$ ]]; then
    echo "DEADLINE_S must be seconds, got $DEADLINE_S" >&2
    exit 2
fi
wheels=${1:+$(realpath "$1")}
data=${MPICDSGD_DATA:+$(realpath "$MPICDSGD_DATA")}
cifar10=${CIFAR10:+$(realpath "$CIFAR10")}
repo=$(realpath "$(dirname "$0")/../..")
python=$(command -v "${PYTHON:-python3}")
if ! "$python" -c "import torch" 2>/dev/null; then
    echo "$python has no torch: choose another with PYTHON=" >&2
    exit 2
fi
scratch=$(mktemp -d "${TMPDIR:-/tmp}/mpicdsgd-gpu.XXXXXX")
trap 'rm -rf "$scratch"' EXIT

has_gpu=1
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || has_gpu=
if [ -n "${OUT_DIR:-}" ]; then
    out=$(realpath -m "$OUT_DIR")
elif [ -n "$has_gpu" ]; then
    out=$repo/bench/results
else
    out=$(mktemp -d "${TMPDIR:-/tmp}/mpicdsgd-emulated.XXXXXX")
fi
mkdir -p "$out"
log=$out/gpu-suite.log
phases=$scratch/phases.tsv
: >"$log"
: >"$phases"

venv=$scratch/venv
PATH=$venv/bin:$(dirname "$python"):$PATH
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 CUPY_CACHE_DIR=$scratch/cupy
unset PYTHONPATH
if [ -n "$data" ]; then export MPICDSGD_DATA=$data; fi
# Not in the checkout, whose sources would hide the installed package.
mkdir "$scratch/run"
cd "$scratch/run"

deadline=$DEADLINE_S
reserve=200 # seconds that the phases before the benches leave to them
failed=0

# phase NAME LIMIT_S COMMAND...: a line on the screen and in the table, all it says in the log.
phase() {
    local name=$1 limit=$2 began=$SECONDS status=0 well=yes became start
    shift 2
    local left=$((deadline - reserve - SECONDS))
    limit=$((limit < left ? limit : left))
    printf '\n== %s, at most %d s: %s\n' "$name" "$limit" "$*" >>"$log"
    start=$(stat -c %s "$log")
    if [ "$limit" -ge 5 ]; then
        timeout --kill-after=10 "$limit" "$@" >>"$log" 2>&1 </dev/null || status=$?
        became=$(tail -c "+$((start + 1))" "$log" |
            grep -aE '(passed|failed|skipped|error|deselected).* in [0-9.]+s' | tail -n 1 | tr -d '=\t' || true)
        case $status in
        0) became=${became:-done} ;;
        124 | 137) became="stopped after $limit s" ;;
        *) became="exit code $status${became:+, $became}" ;;
        esac
    else
        status=1 became="not run: the time is up"
    fi
    if [ "$status" -ne 0 ]; then well=NO failed=1; fi
    printf '%s\t%s\t%s\t%d\n' "$name" "$well" "$became" $((SECONDS - began)) >>"$phases"
    printf '%-28s %4d s  %s\n' "$name" $((SECONDS - began)) "$became"
    [ "$status" -eq 0 ]
}

give_up() {
    tail -n 20 "$log"
    echo "given up; the log: $log"
    exit 1
}

# What this Python has is seen in the new environment too, also where it is one itself.
phase "environment" 60 "$python" -m venv --without-pip "$venv" || give_up
"$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
    >"$(echo "$venv"/lib/python*/site-packages)/outer.pth"
# --ignore-installed: what is there outside does not count, as mpi4py looks for MPI in here.
pip=(python -m pip --disable-pip-version-check install --no-index --no-deps --no-cache-dir
    --ignore-installed)
if [ -n "$wheels" ]; then
    phase "wheels" 60 "${pip[@]}" --no-compile "$wheels"/*.whl || true
fi
# The GPU kernels are compiled ahead for all GPUs where nvcc is: the log says so, or why not.
phase "build" 180 "${pip[@]}" -v --no-build-isolation -C build-dir="$scratch/build" "$repo" || give_up
# The bits of the host's compiled kernel are what the GPU's are compared with.
phase "host kernel" 60 python -c '
import sys
from mpicdsgd.kernels import native
print(native.backend, native.isa, native.reason)
sys.exit(native.backend != "compiled")' || tail -n 1 "$log"
phase "dependencies" 60 python -c '
import re, sys
from importlib import metadata
def has(name):
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return ""
needed = [r for r in metadata.requires("mpicdsgd") if "extra ==" not in r]
missing = [r for r in needed if not has(re.match(r"[\w-]+", r)[0])]
print("missing, and no wheel was given:", missing) if missing else print("all there")
sys.exit(bool(missing))' || tail -n 1 "$log"
mpi=1
phase "two ranks meet" 60 mpiexec -n 2 python -c '
from mpi4py import MPI
assert MPI.COMM_WORLD.allreduce(1) == 2
print(MPI.Get_library_version().splitlines()[0])' || mpi=
if [ -z "$mpi" ]; then echo "    without an MPI library there is little to do: give mpich's wheel"; fi
reason=$(python -c 'from mpicdsgd.kernels import gpu; print(gpu.why_not())')
if [ -z "$has_gpu$reason" ]; then reason="torch finds no GPU"; fi

# pyproject.toml sets a limit for each test, which is a plugin's.
# Other versions of torch and NumPy may warn of what those that the tests were written with do not.
pytest=(python -m pytest -c "$repo/pyproject.toml" -p no:cacheprovider -q -m gpu -W default
    -o timeout=100 -o faulthandler_timeout=60 -p)
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
if python -c 'import pytest_timeout' 2>/dev/null; then
    pytest+=(pytest_timeout)
else
    echo 'def pytest_addoption(parser): parser.addini("timeout", "stands in for pytest-timeout")' \
        >"$scratch/run/no_timeout.py"
    pytest+=(no_timeout)
fi
phase "tests, unit" 120 "${pytest[@]}" "$repo/tests/unit" || true
if [ -n "$mpi" ]; then
    phase "tests, MPI, alone" 120 "${pytest[@]}" "$repo/tests/mpi" || true
    for ranks in 1 2 4; do
        phase "tests, MPI, n = $ranks" 150 mpiexec -n "$ranks" \
            "${pytest[@]}" "$repo/tests/mpi" || true
    done
fi

reserve=0
kernel=() exchange=(--quick --size 25000000) step=(--quick)
if [ -n "$reason" ]; then kernel=(--emulate) exchange=(--emulate) step=(--emulate); fi
if [ -n "$cifar10" ]; then step+=(--cifar10 "$cifar10"); fi
records=()
bench() { # NAME LIMIT_S OPTIONS...
    local name=$1 limit=$2
    shift 2
    records+=("$scratch/gpu-$name.json")
    phase "bench, $name" "$limit" \
        python "$repo/bench/gpu/$name.py" --out "$scratch/gpu-$name.json" "$@" || true
}
bench kernel 180 "${kernel[@]}"
if [ -n "$mpi" ]; then
    bench exchange 150 "${exchange[@]}"
    bench step 120 "${step[@]}"
fi

echo
python "$repo/bench/common.py" --phases "$phases" --out "$scratch/gpu-suite.json" "${records[@]}" |
    tee -a "$log"
cp "$scratch"/gpu-*.json "$out/"
echo
if [ -n "$reason" ]; then
    echo "NO GPU HERE ($reason): the tests marked gpu were skipped, the benches emulated. Nothing"
    echo "of this says how fast or how right a GPU would be."
fi
echo "records and log: $out"
exit "$failed"

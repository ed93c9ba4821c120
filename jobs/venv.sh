# shellcheck shell=bash
# Sourced as `source jobs/venv.sh EXTRAS` in the checkout's root: makes .venv with this package and
# EXTRAS (comma-separated) installed, or reuses it where nothing that the install depends on changed,
# and activates it. PYTHON chooses the interpreter.
venv_python=${PYTHON:-python3}
if ! "$venv_python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
    echo "mpicdsgd needs Python 3.11 to 3.13, and $venv_python is not: set PYTHON=/path/to/python3.12" >&2
    exit 2
fi
[ -x .venv/bin/python ] || "$venv_python" -m venv .venv
# shellcheck disable=SC1091
source .venv/bin/activate
venv_state="$1 $PWD $(cat pyproject.toml CMakeLists.txt constraints.txt mpicdsgd/kernels/native/*.{h,cpp,cu} | cksum)"
if [ "$(cat ".venv/installed-$1" 2>/dev/null)" != "$venv_state" ]; then
    echo "installing mpicdsgd with $1 into $PWD/.venv"
    # torch first and alone: pip then takes the pinned build before anything else asks for one.
    python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
    python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$1]"
    echo "$venv_state" >".venv/installed-$1"
fi

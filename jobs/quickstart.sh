#!/usr/bin/env bash
# From a machine with Python and a C++ compiler to five agents that have learnt handwritten digits:
#   bash jobs/quickstart.sh
# Begins anew each time; what it trained stands in runs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
source jobs/venv.sh mpich,demo

rm -rf runs/quickstart
echo "training: 5 MPI ranks on a ring, no server (jobs/quickstart.toml)"
mpiexec -n 5 mpicdsgd train jobs/quickstart.toml
mpicdsgd plot runs/quickstart

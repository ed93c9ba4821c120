"""Which network the mpich wheel is to use under ``srun --mpi=pmi2``: chosen as this is imported.

Its first choice, ucx, exchanges addresses of 4 KB, most of it whatever memory lies behind them.
Slurm reads no more than 1,024 characters of such a request; memory that does not compress makes it
longer, and then all ranks wait in MPI_Init for ever (MPICH 5.0.2, its issue 6924). The other, ofi,
sends 16 bytes. Only steps over several nodes exchange any, and ``mpirun`` reads requests whole.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

_CHOICES = ("MPIR_CVAR_CH4_NETMOD", "MPICH_CH4_NETMOD", "MPIR_PARAM_CH4_NETMOD")
_TEXT = (
    "MPICH uses its network ofi: under srun --mpi=pmi2 its first choice, ucx, may wait for ever as "
    "it starts; MPIR_CVAR_CH4_NETMOD=ucx overrules this, and under mpirun both work"
)


def choose(environment: MutableMapping[str, str]) -> str:
    """Have MPICH take ofi where ucx may wait for ever; what to say of it, "" where nothing is done.

    Args:
        environment: of this process, before MPI starts; a choice made there stands.
    """
    if "mpi4py.MPI" in sys.modules:  # MPI has started, and by its own choice
        return ""
    nodes = environment.get("SLURM_STEP_NUM_NODES", "1")
    by_slurm = "PMI_FD" in environment and "MPI_LOCALNRANKS" not in environment  # mpirun sets that
    if not by_slurm or nodes == "1" or any(name in environment for name in _CHOICES):
        return ""
    folder = _wheel()
    if not all((folder / name).exists() for name in ("libfabric.so.1", "libucp.so.0")):
        return ""  # another MPICH may have one of them only
    environment["MPIR_CVAR_CH4_NETMOD"] = "ofi"
    return _TEXT


def _wheel() -> Path:
    """Where the mpich wheel keeps its networks: mpi4py's own wheel looks for MPI beside itself."""
    spec = importlib.util.find_spec("mpi4py")
    return Path(spec.origin).parents[3] / "mpich" if spec and spec.origin else Path("/nowhere")


REMARK = choose(os.environ)

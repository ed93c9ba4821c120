"""What the mpich wheel needs under ``srun --mpi=pmi2``, done as this is imported.

Its first choice of a network, ucx, exchanges addresses of 4 KB, most of it whatever memory lies
behind them. Slurm reads no more than 1,024 characters of such a request; memory that does not
compress makes it longer, and then all ranks wait in MPI_Init for ever (MPICH 5.0.2, its issue
6924). The other, ofi, sends 16 bytes. Only steps over several nodes exchange any, and ``mpirun``
reads requests whole.

Its ranks on a node meet in a file in /dev/shm that is named after job and step. Ranks that were
killed leave it, and those of the same job sent back to the queue would take it for their own: they
fail in MPI_Init, or wait there for ever (MPICH 5.0.2). Under ``mpirun`` no name comes twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import sys
import time
from collections.abc import Mapping, MutableMapping
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
    if not _by_slurm(environment) or nodes == "1" or any(name in environment for name in _CHOICES):
        return ""
    folder = _wheel()
    if not all((folder / name).exists() for name in ("libfabric.so.1", "libucp.so.0")):
        return ""  # another MPICH may have one of them only
    environment["MPIR_CVAR_CH4_NETMOD"] = "ofi"
    return _TEXT


def clear(environment: Mapping[str, str], folder: Path = Path("/dev/shm")) -> None:
    """Remove the file where the ranks on this node meet if it is older than this job step. Local.

    Args:
        environment: of this process, before MPI starts.
    """
    keys = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NODEID")
    job, step, node = (environment.get(key, "") for key in keys)
    began = step_began() if _by_slurm(environment) else None
    if began is None or "mpi4py.MPI" in sys.modules:
        return
    path = folder / f"mpich_shm_{_fnv1a(f'{job}.{step}'):x}_{node}"
    # There is none, or another rank was faster. Only who holds the lock removes, and only what it
    # has looked at: the others' new file must stay.
    with contextlib.suppress(OSError), open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = os.fstat(file.fileno())
        if found.st_mtime < began and os.path.samestat(found, path.stat()):
            path.unlink()


def step_began() -> float | None:
    """When Slurm began this job step on this node, by the node's clock; None: it did not."""
    process = os.getppid()
    try:
        while process > 1:
            text = Path(f"/proc/{process}/stat").read_text()
            name, _, rest = text.rpartition(")")
            fields = rest.split()
            if name.endswith("(slurmstepd"):
                age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf(
                    "SC_CLK_TCK"
                )
                return time.time() - age_s
            process = int(fields[1])
    except (OSError, ValueError, IndexError):
        pass
    return None


def _by_slurm(environment: Mapping[str, str]) -> bool:
    """Whether Slurm has started this rank, by the wheel's protocol; mpirun sets the other."""
    return "PMI_FD" in environment and "MPI_LOCALNRANKS" not in environment


def _fnv1a(text: str) -> int:
    """The hash by which MPICH names the file (FNV-1a, 32 bits)."""
    value = 2166136261
    for byte in text.encode():
        value = (value ^ byte) * 16777619 % 2**32
    return value


def _wheel() -> Path:
    """Where the mpich wheel keeps its networks: mpi4py's own wheel looks for MPI beside itself."""
    spec = importlib.util.find_spec("mpi4py")
    return Path(spec.origin).parents[3] / "mpich" if spec and spec.origin else Path("/nowhere")


clear(os.environ)
REMARK = choose(os.environ)

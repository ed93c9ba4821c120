"""Starting the ranks of a job where no launcher has, and finding launchers that do not fit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from mpicdsgd.common.errors import UserError

_SET_BY_LAUNCHERS = ("PMI_RANK", "PMI_SIZE", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID")


def inside_job() -> bool:
    """Whether an MPI launcher has started this process."""
    return any(name in os.environ for name in _SET_BY_LAUNCHERS)


def relaunch(agents: int, arguments: list[str]) -> NoReturn:
    """Replace this process by ``mpiexec -n agents mpicdsgd arguments``.

    The ``mpiexec`` beside this Python comes first: it belongs to the MPI library that was
    installed with it.

    Raises:
        UserError: if there is no mpiexec, ``agents`` < 1, or srun has started several tasks.
    """
    tasks = os.environ.get(_STEP, "1")
    if tasks != "1":
        raise UserError(
            f"--agents {agents} starts the ranks itself, but srun has started {tasks} tasks: leave "
            "--agents out, or srun"
        )
    if agents < 1:
        raise UserError(f"--agents must be at least 1, got {agents}")
    beside = Path(sys.executable).parent / "mpiexec"
    launcher = str(beside) if beside.exists() else shutil.which("mpiexec")
    if launcher is None:
        raise UserError(
            "no mpiexec beside this Python or in PATH: pip install mpich, or load your site's MPI"
        )
    command = [launcher, "-n", str(agents)]
    version = subprocess.run([launcher, "--version"], capture_output=True, text=True, check=False)
    if "Open MPI" in version.stdout or "prte" in version.stdout.lower():
        command.append("--oversubscribe")
    command += [sys.executable, "-m", "mpicdsgd", *arguments]
    sys.stdout.flush()
    os.execv(launcher, command)


def lonely(environment: Mapping[str, str], size: int, library: str) -> str:
    """What is wrong if the launcher started more ranks than found each other; "" if nothing is.

    What an MPI launcher says of the world goes before what Slurm says: below ``mpirun`` in a batch
    job Slurm's variables describe the allocation, or the step of mpirun's own daemons.

    Args:
        environment: this process's.
        size: of the world, as MPI has it.
        library: what ``MPI.Get_library_version()`` says.
    """
    given = {n: int(v) for n in _SIZES if (v := environment.get(n, "")).isdecimal()}
    if not given:
        return ""
    name, started = next(iter(given.items()))
    if started <= size:
        return ""
    found = "no two of them" if size == 1 else f"no more than {size} of them"
    short, plugin = fitting(library)
    if _STEP in given and not any(name in environment for name in _BY_MPIRUN):
        tasks = environment.get("SLURM_NTASKS", str(started))
        return (
            f"srun started {started} tasks (SLURM_NTASKS={tasks}), but {found} found each other: "
            f"srun was not told how to support this MPI library ({short}): use srun "
            f"--mpi={plugin} (srun --mpi=list shows what there is), or mpirun in the batch script"
        )
    return (
        f"the launcher started {started} ranks ({name}), but {found} found each other: it belongs "
        f"to another MPI library than the one that this Python has loaded ({short}): use the "
        f"mpiexec that came with that, or srun --mpi={plugin}"
    )


_STEP = "SLURM_STEP_NUM_TASKS"  # set by srun alone: in a batch script there is no such variable
_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", _STEP)
_BY_MPIRUN = ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")


def fitting(version: str) -> tuple[str, str]:
    """A short name of the MPI library, and what ``srun --mpi=`` is to say for it.

    Args:
        version: what ``MPI.Get_library_version()`` says.
    """
    short = " ".join(version.replace("\0", " ").split())
    for end in (" Version:", ",", " Release Date"):
        short = short.partition(end)[0]
    if "Open MPI" in version:
        return short[:40], "pmix"
    return short[:40], "cray_shasta" if "CRAY" in version.upper() else "pmi2"

"""Starting the ranks of a job where no launcher has: ``mpicdsgd train --agents 5``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from mpicdsgd.errors import UserError

_SET_BY_LAUNCHERS = ("PMI_RANK", "PMI_SIZE", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID")


def inside_job() -> bool:
    """Whether an MPI launcher has started this process."""
    return any(name in os.environ for name in _SET_BY_LAUNCHERS)


def relaunch(agents: int, arguments: list[str]) -> NoReturn:
    """Replace this process by ``mpiexec -n agents mpicdsgd arguments``.

    The ``mpiexec`` beside this Python comes first: it belongs to the MPI library that was
    installed with it.

    Raises:
        UserError: if there is no mpiexec, or ``agents`` < 1.
    """
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

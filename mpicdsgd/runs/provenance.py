"""What made a run: versions, hosts and the commit."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from mpicdsgd.common import signals


def versions(mpi_library: str = "", kernel: str = "") -> dict[str, str]:
    """What a result depends on: versions, the kernel, and the commit where run from a checkout.

    Args:
        mpi_library: what ``MPI.Get_library_version()`` says.
        kernel: which kernel does the update.
    """
    found = {"python": platform.python_version()}
    for package in ("mpicdsgd", "torch", "numpy", "mpi4py", "h5py"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = str(getattr(sys.modules.get(package), "__version__", "unknown"))
    if mpi_library:
        found["mpi"] = " ".join(mpi_library.replace("\0", " ").split())
    if kernel:
        found["kernel"] = kernel
    if commit := _commit():
        found["commit"] = commit
    return found


def _commit() -> str:
    """The checkout's commit, "-dirty" if files differ; "" where the package is in no checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        try:
            with signals.not_for_children():
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=20, check=True
                )
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout.strip()

    # An installed package may lie inside a checkout that is the user's.
    if not (root / ".git").exists() or not (commit := git("rev-parse", "HEAD")):
        return ""
    return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")

"""Two checkouts of this project beside each other: what `against.py` and `same_bits.py` share.

Needs nothing but Python itself, and imports nothing of either checkout.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_LAUNCHERS = ("PMI_", "PMIX_", "OMPI_", "HYDRA_", "MPI_LOCAL")  # an outer job's settings


class Checkout:
    """A checkout, with the Python that runs its code.

    Attributes:
        python: its own `.venv/bin/python`, where there is one, else the current one.
        commit: with a + where files that git tracks have changed; "unknown" without git.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        if not (self.path / "mpicdsgd" / "__init__.py").exists():
            sys.exit(f"{path} is no checkout: it has no mpicdsgd/__init__.py")
        own = self.path / ".venv" / "bin" / "python"
        self._has_own = own.exists()
        self.python = str(own) if self._has_own else sys.executable
        commit = self._git("rev-parse", "--short", "HEAD")
        changed = self._git("status", "--porcelain", "--untracked-files=no")
        self.commit = f"{commit}{'+' if changed else ''}" if commit else "unknown"
        with tempfile.TemporaryDirectory() as folder:
            command = [self.python, "-c", "import mpicdsgd; print(mpicdsgd.__file__)"]
            package = Path(self.run(command, Path(folder), 300).splitlines()[-1])
        if not package.is_relative_to(self.path):
            sys.exit(f"{self.python} imports {package}, not what is in {self.path}")

    def __str__(self) -> str:
        return f"{self.path}, {self.commit}, {self.python}"

    def _git(self, *arguments: str) -> str:
        command = ["git", "-C", str(self.path), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    def environment(self) -> dict[str, str]:
        """For a process of this checkout: one thread, and nothing of another's code."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHERS)}
        own.pop("PYTHONPATH", None)
        if not self._has_own:  # an installed package would hide the checkout's
            own["PYTHONPATH"] = str(self.path)
        return own | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def on_ranks(self, ranks: int, *arguments: str) -> list[str]:
        """The command that starts its Python with ``arguments`` on ``ranks`` ranks."""
        beside = Path(self.python).parent / "mpiexec"
        found = str(beside) if beside.exists() else shutil.which("mpiexec")
        if found is None:
            sys.exit(f"there is no mpiexec beside {self.python} or in PATH: pip install mpich")
        return [found, "-n", str(ranks), self.python, *arguments]

    def run(self, command: Sequence[str], folder: Path, timeout_s: float) -> str:
        """What ``command`` prints, run in ``folder``; where it fails, this program ends, too.

        The folder is to be none of a checkout, whose package Python might take.
        """
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            sys.exit(f"{self.path}: stopped after {timeout_s:.0f} s: {' '.join(command)}")
        if done.returncode:
            said = "\n".join(done.stdout.splitlines()[-20:])
            sys.exit(f"{self.path}: exit code {done.returncode} of {' '.join(command)}\n{said}")
        return done.stdout

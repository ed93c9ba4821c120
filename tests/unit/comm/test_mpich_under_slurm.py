"""What the mpich wheel needs under srun: which network, and no file of an earlier start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mpicdsgd.comm import mpich_under_slurm

# As seen in the ranks of steps over two nodes.
SRUN = {"SLURM_STEP_NUM_NODES": "2", "PMI_FD": "11", "PMI_RANK": "1"}
MPIRUN = {**SRUN, "MPI_LOCALNRANKS": "1"}
ONE_NODE = {**SRUN, "SLURM_STEP_NUM_NODES": "1"}
PMIX = {"SLURM_STEP_NUM_NODES": "2", "PMIX_RANK": "1"}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("libfabric.so.1", "libucp.so.0"):
        (tmp_path / name).touch()
    monkeypatch.setattr(mpich_under_slurm, "_wheel", lambda: tmp_path)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    return tmp_path


def test_under_srun_over_nodes(wheel: Path) -> None:
    environment = dict(SRUN)
    assert "MPIR_CVAR_CH4_NETMOD=ucx overrules this" in mpich_under_slurm.choose(environment)
    assert environment == {**SRUN, "MPIR_CVAR_CH4_NETMOD": "ofi"}
    assert mpich_under_slurm.choose(environment) == ""


@pytest.mark.parametrize("environment", [{}, MPIRUN, ONE_NODE, PMIX])
def test_elsewhere_it_stays_mpichs_choice(environment: dict[str, str], wheel: Path) -> None:
    before = dict(environment)
    assert mpich_under_slurm.choose(environment) == ""
    assert environment == before


@pytest.mark.parametrize("name", ["MPIR_CVAR_CH4_NETMOD", "MPICH_CH4_NETMOD"])
def test_who_chose_is_obeyed(name: str, wheel: Path) -> None:
    environment = {**SRUN, name: "ucx"}
    assert mpich_under_slurm.choose(environment) == ""
    assert environment == {**SRUN, name: "ucx"}


def test_mpi_that_has_started_is_past_choosing(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is to be said of a network that is not used."""
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", ModuleType("mpi4py.MPI"))
    environment = dict(SRUN)
    assert mpich_under_slurm.choose(environment) == ""
    assert environment == SRUN


@pytest.mark.parametrize("missing", ["libfabric.so.1", "libucp.so.0"])
def test_an_mpich_of_one_network(missing: str, wheel: Path) -> None:
    """It would end with an error if told to use the other."""
    (wheel / missing).unlink()
    environment = dict(SRUN)
    assert mpich_under_slurm.choose(environment) == ""
    assert environment == SRUN


def test_the_wheel_is_looked_for_where_mpi4py_does() -> None:
    spec = pytest.importorskip("mpi4py").__spec__
    assert Path(spec.origin).is_relative_to(mpich_under_slurm._wheel().parent)
    assert mpich_under_slurm._wheel().parent.name in ("lib", "lib64")


STEP = {**SRUN, "SLURM_JOB_ID": "77000", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1"}
MEETING = "mpich_shm_d7ad06d7_1"  # of job 77000, step 0, node 1, as MPICH 5.0.2 names it


@pytest.fixture
def shm(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The step began 100 s after 1970 did; files of its node from before and of others."""
    monkeypatch.setattr(mpich_under_slurm, "step_began", lambda: 100.0)
    for name in (MEETING, MEETING[:-1] + "0", "mpich_shm_1_1"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (99, 99))
    return tmp_path


def test_an_earlier_starts_file_is_removed(shm: Path) -> None:
    mpich_under_slurm.clear(STEP, shm)
    assert not (shm / MEETING).exists()
    assert len(list(shm.glob("mpich_shm_*"))) == 2, "of other nodes and jobs"
    mpich_under_slurm.clear(STEP, shm)


def test_this_steps_file_stays(shm: Path) -> None:
    os.utime(shm / MEETING, (101, 101))
    mpich_under_slurm.clear(STEP, shm)
    assert (shm / MEETING).exists()


@pytest.mark.parametrize(
    "environment",
    [{}, MPIRUN, PMIX, {**STEP, "MPI_LOCALNRANKS": "2"}, {**STEP, "SLURM_JOB_ID": ""}],
)
def test_others_have_no_such_file(environment: dict[str, str], shm: Path) -> None:
    mpich_under_slurm.clear(environment, shm)
    assert (shm / MEETING).exists()


def test_ranks_at_once_remove_one_file(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waited for the lock finds another file there, made meanwhile by the faster one's MPI."""
    flock = mpich_under_slurm.fcntl.flock

    def late(file: Any, how: int) -> None:
        (shm / MEETING).unlink()
        (shm / MEETING).touch()
        os.utime(shm / MEETING, (99, 99))  # its age alone would not save it
        flock(file, how)

    monkeypatch.setattr(mpich_under_slurm.fcntl, "flock", late)
    mpich_under_slurm.clear(STEP, shm)
    assert (shm / MEETING).exists()


def test_when_a_step_began() -> None:
    """The nearest slurmstepd above a process tells; here a shell that bears its name."""
    code = "from mpicdsgd.comm import mpich_under_slurm as m; print(m.step_began())"
    assert mpich_under_slurm.step_began() is None or "SLURM_STEP_ID" in os.environ
    named = f"""
import ctypes, subprocess, sys, time
ctypes.CDLL(None).prctl(15, b"slurmstepd", 0, 0, 0)
print(time.time())
time.sleep(1)
print(subprocess.run(["sh", "-c", sys.executable + " -c '{code}'; true"],
                     capture_output=True, text=True).stdout)
"""
    done = subprocess.run(
        [sys.executable, "-c", named], capture_output=True, text=True, check=True, timeout=60
    )
    after, began = map(float, done.stdout.split())
    assert after - 30 < began <= after

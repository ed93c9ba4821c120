"""Which of the mpich wheel's networks a step of srun uses."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from mpicdsgd import network

# As seen in the ranks of steps over two nodes.
SRUN = {"SLURM_STEP_NUM_NODES": "2", "PMI_FD": "11", "PMI_RANK": "1"}
MPIRUN = {**SRUN, "MPI_LOCALNRANKS": "1"}
ONE_NODE = {**SRUN, "SLURM_STEP_NUM_NODES": "1"}
PMIX = {"SLURM_STEP_NUM_NODES": "2", "PMIX_RANK": "1"}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("libfabric.so.1", "libucp.so.0"):
        (tmp_path / name).touch()
    monkeypatch.setattr(network, "_wheel", lambda: tmp_path)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    return tmp_path


def test_under_srun_over_nodes(wheel: Path) -> None:
    environment = dict(SRUN)
    assert "MPIR_CVAR_CH4_NETMOD=ucx overrules this" in network.choose(environment)
    assert environment == {**SRUN, "MPIR_CVAR_CH4_NETMOD": "ofi"}
    assert network.choose(environment) == ""


@pytest.mark.parametrize("environment", [{}, MPIRUN, ONE_NODE, PMIX])
def test_elsewhere_it_stays_mpichs_choice(environment: dict[str, str], wheel: Path) -> None:
    before = dict(environment)
    assert network.choose(environment) == ""
    assert environment == before


@pytest.mark.parametrize("name", ["MPIR_CVAR_CH4_NETMOD", "MPICH_CH4_NETMOD"])
def test_who_chose_is_obeyed(name: str, wheel: Path) -> None:
    environment = {**SRUN, name: "ucx"}
    assert network.choose(environment) == ""
    assert environment == {**SRUN, name: "ucx"}


def test_mpi_that_has_started_is_past_choosing(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is to be said of a network that is not used."""
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", ModuleType("mpi4py.MPI"))
    environment = dict(SRUN)
    assert network.choose(environment) == ""
    assert environment == SRUN


@pytest.mark.parametrize("missing", ["libfabric.so.1", "libucp.so.0"])
def test_an_mpich_of_one_network(missing: str, wheel: Path) -> None:
    """It would end with an error if told to use the other."""
    (wheel / missing).unlink()
    environment = dict(SRUN)
    assert network.choose(environment) == ""
    assert environment == SRUN


def test_the_wheel_is_looked_for_where_mpi4py_does() -> None:
    spec = pytest.importorskip("mpi4py").__spec__
    assert Path(spec.origin).is_relative_to(network._wheel().parent)
    assert network._wheel().parent.name in ("lib", "lib64")

"""Ranks that a launcher started and that do not find each other."""

from __future__ import annotations

import pytest

from mpicdsgd import UserError
from mpicdsgd.cli import launch

MPICH = "MPICH Version:      5.0.2\nMPICH Release date: now\nMPICH ABI:          18:2:6\0"
OPEN_MPI = "Open MPI v5.0.8, package: Open MPI x@y Distribution, ident: 5.0.8\0"
CRAY = "MPI VERSION    : CRAY MPICH version 8.1.29.24 (ANL base 3.4a2)\n"
INTEL = "Intel(R) MPI Library 2021.13 for Linux* OS\n\0"

# As seen in the ranks of a batch job of two nodes with two tasks on each.
BATCH = {"SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_PROCID": "0"}
SRUN = {**BATCH, "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}
PMI2 = {**SRUN, "PMI_RANK": "1", "PMI_SIZE": "4"}
PMIX = {**SRUN, "PMIX_RANK": "1"}
HYDRA = {**SRUN, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "PMI_RANK": "1", "PMI_SIZE": "4",
         "MPI_LOCALNRANKS": "2"}  # fmt: skip
MPIRUN = {**HYDRA, "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "1"}


@pytest.mark.parametrize("environment", [SRUN, PMI2, PMIX, HYDRA, MPIRUN])
def test_ranks_that_found_each_other(environment: dict[str, str]) -> None:
    assert launch.lonely(environment, 4, MPICH) == ""


@pytest.mark.parametrize("environment", [{}, BATCH, {"PMI_SIZE": "1"}, {"PMI_SIZE": "many"}])
def test_one_process_is_no_mistake(environment: dict[str, str]) -> None:
    """In a batch script, too: there SLURM_NTASKS describes what mpirun may use."""
    assert launch.lonely(environment, 1, MPICH) == ""


def test_a_world_of_several_steps_is_no_mistake() -> None:
    """A heterogeneous job: Slurm counts the tasks of each component."""
    assert launch.lonely(SRUN, 8, MPICH) == ""


@pytest.mark.parametrize(
    ("library", "short", "plugin"),
    [
        (MPICH, "MPICH", "pmi2"),
        (OPEN_MPI, "Open MPI v5.0.8", "pmix"),
        (CRAY, "MPI VERSION : CRAY MPICH version 8.1.29.", "cray_shasta"),
        (INTEL, "Intel(R) MPI Library 2021.13 for Linux*", "pmi2"),
    ],
)
@pytest.mark.parametrize("environment", [SRUN, PMI2, PMIX])
def test_under_srun(environment: dict[str, str], library: str, short: str, plugin: str) -> None:
    text = launch.lonely(environment, 1, library)
    assert text.startswith("srun started 4 tasks (SLURM_NTASKS=4), but no two of them found each")
    assert f"({short}" in text
    assert f"use srun --mpi={plugin} (srun --mpi=list shows what there is), or mpirun" in text


@pytest.mark.parametrize(("environment", "name"), [
    (HYDRA, "PMI_SIZE"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE"),
])  # fmt: skip
def test_under_another_librarys_mpirun(environment: dict[str, str], name: str) -> None:
    text = launch.lonely(environment, 1, OPEN_MPI)
    assert text.startswith(f"the launcher started 4 ranks ({name}), but no two of them found each")
    assert "belongs to another MPI library than the one that this Python has loaded" in text


def test_some_of_them() -> None:
    assert "but no more than 2 of them found each other" in launch.lonely(SRUN, 2, MPICH)


def test_agents_within_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of four tasks would start a job of its own, all in the same folder."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(UserError, match=r"--agents 4 .* but srun has started 4 tasks: leave"):
        launch.relaunch(4, ["train", "r.toml"])

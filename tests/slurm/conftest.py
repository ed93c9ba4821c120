"""A Slurm of four nodes on this machine, for all tests here; skipped where there can be none."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import HERE, Batch, Cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    up = subprocess.run(
        ["bash", str(HERE / "up.sh"), str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False,
    )  # fmt: skip
    if up.returncode == 3:
        pytest.skip(up.stdout.strip().splitlines()[-1])
    assert up.returncode == 0, up.stdout
    yield Cluster(folder, tmp_path_factory.mktemp("work"))
    subprocess.run(["bash", str(HERE / "down.sh"), str(folder)], timeout=200, check=True)


@pytest.fixture(scope="session")
def whole(cluster: Cluster) -> Callable[[int], Path]:
    """``whole(agents)``: the folder of the undisturbed run of so many, without Slurm."""

    def whole(agents: int) -> Path:
        folder = cluster.work / f"whole-{agents}"
        if not folder.exists():
            ranks = ("mpiexec", "-n", str(agents))
            cluster.call(*ranks, "mpicdsgd", "train", "r.toml", f"run.dir={folder.name}")
        return folder

    return whole


@pytest.fixture(scope="session")
def limited(cluster: Cluster) -> Batch:
    """A job that runs into its limit of a minute, by itself, while others are looked at."""
    command = ("--signal=B:USR1@40", "jobs/requeue.sbatch", "r.toml", "limited")
    return cluster.submit("-N2", "-wn1,n2", "-t1", *command, pace_s=1.0)

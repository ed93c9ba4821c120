"""Which GPU a rank takes, what is said of it, and whether MPI is given device pointers."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
from emulation.gpu import EmulatedGpu
from mpi4py import MPI
from oracle import make_agents

from mpicdsgd import Agents, UserError
from mpicdsgd.comm import agreement, devices
from mpicdsgd.comm.exchange import gpu_aware_probe
from mpicdsgd.kernels import gpu


class Machine:
    """What `mpicdsgd.kernels.gpu` says of this rank's machine, and what was done with it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpus: int, reason: str = "") -> None:
        self.opened: list[int] = []
        self.prepared = 0
        monkeypatch.setattr(gpu, "count", lambda: gpus)
        monkeypatch.setattr(gpu, "why_not", lambda: reason)
        monkeypatch.setattr(gpu, "open_gpu", self.open)

    def open(self, index: int) -> Any:
        self.opened.append(index)
        one = EmulatedGpu(card=f"card {index}")
        one.prepare = self.prepare  # type: ignore[method-assign]
        return one

    def prepare(self) -> None:
        self.prepared += 1


def agents(comm: MPI.Intracomm, device: str) -> Agents:
    return make_agents(comm, device=device)


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_gpus_are_taken_in_turn(
    comm: MPI.Intracomm,
    gpus: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine = Machine(monkeypatch, gpus)
    with caplog.at_level(logging.INFO, "mpicdsgd"):
        found = agents(comm, "auto")
    assert machine.opened == [comm.rank % gpus]
    assert machine.prepared >= 1
    assert found.gpu is not None
    assert found.gpu.identity == f"card {comm.rank % gpus}"
    if comm.rank == 0:
        shared = comm.size > gpus
        most = -(-comm.size // gpus)
        said = f"{comm.size} ranks on {gpus} GPUs: up to {most} share one"
        assert (said in caplog.text) == shared
        assert (f"{comm.size} ranks, each on a GPU of its own" in caplog.text) == (not shared)


def test_a_gpu_by_number(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 3)
    agents(comm, "cuda:2")
    assert machine.opened == [2]
    with pytest.raises(UserError, match=r'device = "cuda:3": this process sees 3 GPUs'):
        agents(comm, "cuda:3")
    assert agents(comm, "cpu").gpu is None


def test_a_rank_without(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Then none uses one, which is said where there are any; asked for, it is an error of all."""
    last = comm.rank == comm.size - 1
    Machine(monkeypatch, 2, "CuPy cannot be imported" if last else "")
    assert agents(comm, "auto").gpu is None
    if comm.rank == 0:
        assert f"though there are GPUs: on ranks {comm.size - 1} CuPy cannot" in caplog.text
    with pytest.raises(UserError, match=r'device = "cuda": CuPy cannot be imported'):
        agents(comm, "cuda")


def test_a_machine_without_says_nothing(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Machine(monkeypatch, 0, "torch finds no GPU")
    assert agents(comm, "auto").device.type == "cpu"
    assert "GPU" not in caplog.text


def test_kernels_that_do_not_load(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank's failure is an error of all, with the reason."""
    machine = Machine(monkeypatch, 1)

    def fail() -> None:
        if comm.rank == comm.size - 1:
            raise RuntimeError("no kernel image is available")

    machine.prepare = fail  # type: ignore[method-assign]
    with pytest.raises(UserError, match="kernels cannot be loaded: no kernel image"):
        agents(comm, "cuda")


def test_the_first_rank_loads_first(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that not all compile the same at once."""
    machine = Machine(monkeypatch, 1)
    order: list[Any] = []
    original = agreement.agreement

    def watched(comm: Any, name: str, timeout_s: float) -> Any:
        order.append(name)
        return original(comm, name, timeout_s)

    monkeypatch.setattr(devices, "agreement", watched)
    machine.prepare = lambda: order.append("!")  # type: ignore[method-assign]
    agents(comm, "cuda")
    loading = order[order.index("loading the kernels") :]
    step = "loading the kernels"
    own_first = [step, "!", step, "!", step, "!"]
    assert loading == (own_first if comm.rank == 0 else [step, step, step, "!"])


_WHY_NOT = gpu.why_not()


@pytest.mark.skipif(_WHY_NOT == "", reason="here MPI may well take them")
def test_alone_without_a_gpu() -> None:
    """The child process says why, and this one lives."""
    if MPI.COMM_WORLD.rank > 0 or MPI.COMM_WORLD.size > 2:
        pytest.skip("one rank tries it for all, beside one other at most")
    found = gpu_aware_probe._alone(0)
    assert found.startswith("MPI does not move device memory (")
    assert _WHY_NOT in found


def test_a_library_that_dies_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(gpu_aware_probe, "_COMMAND", [sys.executable, "-c", kill])
    assert gpu_aware_probe._alone(0).startswith("MPI given device pointers dies of SIGSEGV")
    monkeypatch.setattr(
        gpu_aware_probe, "_COMMAND", [sys.executable, "-c", "import time; time.sleep(60)"]
    )
    monkeypatch.setattr(gpu_aware_probe, "_ALONE_S", 0.5)
    assert "did not come back within 0.5 s" in gpu_aware_probe._alone(0)
    monkeypatch.setattr(gpu_aware_probe, "_COMMAND", [sys.executable, "-c", "pass"])
    assert gpu_aware_probe._alone(0) == ""

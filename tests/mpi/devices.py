"""Agents with a GPU each: an emulated one, or a real one where there is one (marker `gpu`)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from emulation.gpu import EmulatedGpu
from mpi4py import MPI
from test_exchange import agents_on

from mpicdsgd import Agents

_REAL = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    ],
)

on_devices = pytest.mark.parametrize("device", ["emulated", _REAL])
on_all_devices = pytest.mark.parametrize("device", ["host", "emulated", _REAL])


def agents_with(
    comm: MPI.Intracomm,
    topology: str = "ring",
    device: str = "emulated",
    *,
    per_node: int = 0,
    **options: Any,
) -> Agents:
    """Agents on a graph of `test_exchange`. Collective.

    Args:
        device: "host", "emulated" or "cuda".
        per_node: as if so many ranks shared a node; 0: as it is.
        options: of the emulated GPU.
    """
    agents = agents_on(comm, topology)
    if device == "cuda":
        agents = Agents(comm, agents.mixing, device="cuda")
    elif device == "emulated":
        agents = copy.copy(agents)
        agents.gpu = EmulatedGpu(**options)  # type: ignore[assignment]
    if per_node:
        agents.node = agents.rank - agents.rank % per_node
    return agents

"""What a job would run on: versions, kernel, GPUs, and the way that each edge's values would go."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import h5py
import torch
from mpi4py import MPI

from mpicdsgd import __version__
from mpicdsgd.algorithms.table import titles
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.agreement import agreement
from mpicdsgd.comm.exchange.opening import ExchangeConfig, open_exchange
from mpicdsgd.graphs.mixing_rules import metropolis, uniform
from mpicdsgd.graphs.specs import graph_from_spec
from mpicdsgd.kernels import gpu, native
from mpicdsgd.kernels.gpu import compiled

_SIZE = 1 << 21  # elements of the exchange that is tried: enough to measure a link

_LEVELS = {
    MPI.THREAD_SINGLE: "single",
    MPI.THREAD_FUNNELED: "funneled",
    MPI.THREAD_SERIALIZED: "serialized",
    MPI.THREAD_MULTIPLE: "multiple",
}


def gather(comm: MPI.Intracomm, topology: str) -> dict[str, Any]:
    """The report, the same on every rank. Collective over ``comm``.

    Args:
        topology: the graph whose edges are tried.

    Raises:
        UserError: on every rank, for a topology that does not fit.
    """
    with agreement(comm, "the topology"):
        graph = graph_from_spec(topology, comm.size)
        mixing = uniform(graph) if graph.directed else metropolis(graph)
    log = logging.getLogger("mpicdsgd")
    level = log.level
    log.setLevel(logging.ERROR)  # it is all in the report
    try:
        agents = Agents(comm, mixing)
        exchange = open_exchange(agents, _SIZE, ExchangeConfig())
    finally:
        log.setLevel(level)
    edges = [
        {"from": edge.source, "to": agents.rank, "transport": edge.transport, "why": edge.why}
        for edge in exchange.edges
    ]
    exchange.close()
    built = compiled.built()
    mine = agents.gpu.name if agents.gpu is not None else gpu.why_not()
    gpus = comm.allgather(mine)
    return {
        "mpicdsgd": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "mpi": MPI.Get_library_version().split("\n")[0].strip("\0 "),
        "mpi_threads": _LEVELS[MPI.Query_thread()],
        "ranks": comm.size,
        "nodes": len(set(comm.allgather(agents.node))),
        "hdf5": h5py.version.hdf5_version,
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_rank": agents.share_cores(),
        "kernel": native.backend,
        "kernel_isa": native.isa,
        "kernel_reason": native.reason,
        "kernel_gpu": built.name if built else "compiled at first use",
        "device": str(agents.device),
        "gpu": ", ".join(dict.fromkeys(gpus)),
        "algorithms": titles(),
        "topology": topology,
        "edges": [edge for row in comm.allgather(edges) for edge in row],
    }

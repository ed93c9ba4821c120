"""`mpicdsgd info` under a launcher: the way of every edge, and one error for all ranks."""

from __future__ import annotations

import pytest
from mpi4py import MPI

from mpicdsgd import UserError, graph_from_spec
from mpicdsgd.cli.job_report import gather


@pytest.mark.parametrize("topology", ["ring", "expo"])
def test_every_edge_is_told(comm: MPI.Intracomm, topology: str) -> None:
    report = gather(comm, topology)
    graph = graph_from_spec(topology, comm.size)
    edges = [(s, r) for r in range(comm.size) for s in graph.sources[r]]
    assert [(e["from"], e["to"]) for e in report["edges"]] == edges
    assert {e["transport"] for e in report["edges"]} <= {"direct"}
    assert report["nodes"] == 1
    assert report["algorithms"]["gradient-tracking"] == "gradient tracking"
    assert comm.allgather(report) == [report] * comm.size


def test_a_topology_that_does_not_fit(comm: MPI.Intracomm) -> None:
    with pytest.raises(UserError, match="does not have") as caught:
        gather(comm, f"torus:2x{comm.size}")
    assert caught.value.raised_on_all_ranks

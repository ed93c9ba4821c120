"""What is computed does not depend on how it travels: the same bits in place, by messages, by both.

Several nodes are played on one machine: agents of different `Agents.node` share no memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mpi4py import MPI
from oracle import make_agents
from test_exchange import agents_on
from test_oracle import TOPOLOGIES as ON_EVERY_GRAPH

from mpicdsgd import CDMSGD, CDSGD, Agents, ExchangeConfig, Graph

STEPS = 8
SHAPES = [(7,), (3, 5), (), (257,), (33, 3), (1,)]  # few fill their last cache line
WIRES = ["float32", "bfloat16", "float16"]

TOPOLOGIES = [*ON_EVERY_GRAPH, ("one-way", "")]  # a directed ring

ALGORITHMS: dict[str, Callable[..., Any]] = {
    "nesterov": lambda p, **options: CDMSGD(p, lr=0.05, momentum=0.9, nesterov=True, **options),
    "two-rounds": lambda p, **options: CDSGD(p, lr=0.05, rounds=2, **options),
    "look-ahead": lambda p, **options: CDMSGD(
        p, lr=0.05, momentum=0.9, nesterov="look-ahead", weight_decay=0.01, **options
    ),
}


PLACES = ["two and the rest", "two and each alone", "the last alone"]

# Every algorithm with every wire, and each of both with every place.
CASES = [
    pytest.param(algorithm, wire, PLACES[(i + j) % 3], id=f"{algorithm}-{wire}")
    for i, algorithm in enumerate(ALGORITHMS)
    for j, wire in enumerate(WIRES)
]


def nodes_of(graph: Graph, place: str) -> list[int]:
    """The nodes of all agents: of three or more, there are edges within one and between two."""
    n, mate = graph.n, graph.sources[0][0]
    if place == "the last alone":
        return [0] * (n - 1) + [n - 1]
    others = [j for j in range(n) if j not in (0, mate)]
    together = place == "two and the rest"
    return [0 if j not in others else others[0] if together else j for j in range(n)]


def agents_for(comm: MPI.Intracomm, topology: str, mixing: str) -> Agents:
    """Collective; skips where the graph cannot be."""
    if topology == "one-way":
        return agents_on(comm, topology)
    return make_agents(comm, topology, mixing)


def trained(agents: Agents, algorithm: str, wire: str, transport: str) -> tuple[Any, list[str]]:
    """The state's bytes by name after `STEPS` steps, and how each neighbour's values came.

    A gradient is noise of the agent's and the step's own, and a share of the point where it is
    taken, so that what came from neighbours comes back through it. A buffer is mixed too, as
    BatchNorm's statistics may be: its own published copy is read again. Collective.
    """
    random = torch.Generator().manual_seed(agents.rank)

    def noise(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    parameters = [torch.nn.Parameter(noise(shape)) for shape in SHAPES]
    running = noise((11,))
    exchange = ExchangeConfig(wire=wire, transport=transport, timeout_s=60)
    opt = ALGORITHMS[algorithm](parameters, agents=agents, buffers=[running], exchange=exchange)
    start = opt.x.copy()
    for _ in range(STEPS):
        for parameter in parameters:
            parameter.grad = noise(tuple(parameter.shape)) + 0.3 * parameter.detach()
        running.mul_(0.9).add_(noise((11,)))
        opt.step()
    state = {name: array.tobytes() for name, array in opt.arrays().items()}
    assert state["x"] != start.tobytes()
    ways = [edge.transport for edge in opt.exchange.edges]
    assert [edge.source for edge in opt.exchange.edges] == list(agents.sources)
    opt.close()
    return state, ways


@pytest.mark.parametrize(("algorithm", "wire", "place"), CASES)
@pytest.mark.parametrize(("topology", "mixing"), TOPOLOGIES)
def test_the_same_bits(
    comm: MPI.Intracomm, topology: str, mixing: str, algorithm: str, wire: str, place: str
) -> None:
    agents = agents_for(comm, topology, mixing)
    degree = len(agents.sources)
    expected, ways = trained(agents, algorithm, wire, "neighbor")
    assert ways == ["neighbor"] * degree
    assert (
        expected.keys()
        == {
            "nesterov": {"x", "v"},
            "two-rounds": {"x"},
            "look-ahead": {"x", "v", "y"},
        }[algorithm]
    )

    found, ways = trained(agents, algorithm, wire, "direct")
    assert ways == ["direct"] * degree
    assert found == expected

    if comm.size < 3:  # all edges there may be are of one kind
        return
    nodes = nodes_of(agents.graph, place)
    apart = copy.copy(agents)
    apart.node = nodes[agents.rank]
    found, ways = trained(apart, algorithm, wire, "auto")
    near = [nodes[source] == apart.node for source in agents.sources]
    assert ways == ["direct" if here else "neighbor" for here in near]
    assert {way for row in comm.allgather(ways) for way in row} == {"direct", "neighbor"}
    assert found == expected


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_wires_and_agents_differ(comm: MPI.Intracomm, algorithm: str) -> None:
    """Else bits that agree would say nothing: what travels matters, and whose it is."""
    if comm.size == 1:
        pytest.skip("nothing travels")
    agents = make_agents(comm, "ring")
    states = {trained(agents, algorithm, wire, "direct")[0]["x"] for wire in WIRES}
    assert len(states) == len(WIRES)
    assert len(set(comm.allgather(states.pop()))) == comm.size

"""The exchange between GPUs: right values on every graph and route, in any order that the streams
may run in, and everything given back."""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
from devices import agents_with, on_devices
from emulation.gpu import MAIN
from mpi4py import MPI
from test_exchange import GRAPHS, pattern

from mpicdsgd import AgentLeft, AgentMissing, Agents, ExchangeConfig, UserError
from mpicdsgd.comm.exchange import gpu_aware_probe, gpu_buffers, gpu_routing, staged
from mpicdsgd.comm.exchange.exchange import Exchange
from mpicdsgd.comm.exchange.gpu_routing import open_device_carrier
from mpicdsgd.comm.exchange.header import Reason
from mpicdsgd.comm.exchange.opening import open_exchange

SIZE = 1000  # elements: several chunks below, the last one not full
CHUNK = 1024  # bytes


def open_on(agents: Agents, transport: str = "auto", prefetch: str = "auto") -> Exchange:
    assert agents.gpu is not None
    carrier = open_device_carrier(
        agents, agents.gpu, SIZE, "float32", transport, prefetch, chunk_bytes=CHUNK
    )
    return Exchange(agents, carrier, 60.0)


def run_ahead(exchange: Exchange, agents: Agents, steps: int) -> None:
    """Post and read ``steps`` patterns; the host waits for its streams only at the end."""
    gpu = agents.gpu
    assert gpu is not None
    rng = random.Random(agents.rank)

    def values(agent: int, step: int) -> torch.Tensor:
        return torch.from_numpy(pattern(agent, step, SIZE, np.float32))

    out = torch.stack([values(agents.rank, k) for k in range(steps)]).to(agents.device)
    seen = torch.full((steps, max(1, len(agents.sources)), SIZE), -1.0, device=agents.device)
    for k in range(steps):
        if agents.device.type == "cuda":  # an emulated GPU makes pauses of its own
            torch.cuda._sleep(rng.choice([1, 10**6, 10**7]))
        gpu.copy(exchange.published, out[k].data_ptr(), 4 * SIZE, gpu.stream())
        exchange.post(k, turn=k % len(agents.turns))
        exchange.progress()
        for i, near in enumerate(exchange.wait(k)):
            gpu.copy(seen[k, i].data_ptr(), near, 4 * SIZE, gpu.stream())
    gpu.finish(gpu.stream())
    for k in range(steps):
        for i, source in enumerate(agents.turns[k % len(agents.turns)].sources):
            assert torch.equal(seen[k, i].cpu(), values(source, k)), (k, source, seen[k, i])


def end(exchange: Exchange, agents: Agents, step: int) -> None:
    exchange.post(step)
    exchange.close()
    gpu: Any = agents.gpu
    if agents.device.type != "cuda":
        if MAIN in gpu._streams:
            gpu.destroy_stream(MAIN)
        assert gpu.in_use == 0


ROUTES = {
    "in place": {"transport": "direct", "prefetch": "never"},
    "fetched": {"transport": "direct", "prefetch": "always"},
    "staged": {"transport": "staged"},
    "messages": {"transport": "neighbor"},
}


@pytest.fixture(autouse=True)
def mpi_takes_device_pointers(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An emulated GPU's memory is the host's, so it does; a real one's is tried in earnest."""
    if "cuda" not in request.node.name:
        monkeypatch.setattr(gpu_aware_probe, "_alone", lambda index: "")


@on_devices
@pytest.mark.parametrize("topology", GRAPHS)
@pytest.mark.parametrize("route", ROUTES)
def test_values_whatever_the_streams_do(
    comm: MPI.Intracomm, device: str, topology: str, route: str
) -> None:
    agents = agents_with(comm, topology, device, main="threaded", seed=comm.rank)
    try:
        exchange = open_on(agents, **ROUTES[route])
    except UserError as error:
        if device != "cuda" or route != "messages":
            raise
        pytest.skip(str(error))
    way = {"in place": "direct", "fetched": "direct", "messages": "neighbor"}.get(route, route)
    assert {edge.transport for edge in exchange.edges} <= {way}
    run_ahead(exchange, agents, 12)
    values = sum(len(agents.turns[k % len(agents.turns)].destinations) for k in range(12))
    size = -(-4 * SIZE // 64) * 64
    peers = {*agents.sources, *agents.destinations}
    assert exchange.bytes_sent == 12 * 64 * len(peers) + size * values
    end(exchange, agents, 12)


@on_devices
@pytest.mark.parametrize("topology", GRAPHS)
@pytest.mark.parametrize("remote", ["staged", "messages"])
def test_edges_of_both_kinds(
    comm: MPI.Intracomm, device: str, topology: str, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if remote == "staged":
        monkeypatch.setattr(gpu_aware_probe, "_alone", lambda index: "MPI dies of SIGSEGV")
    elif device == "cuda":
        pytest.skip("this MPI library decides, not the test")
    agents = agents_with(comm, topology, device, per_node=2, main="threaded", seed=comm.rank)
    exchange = open_on(agents)
    for edge in exchange.edges:
        same = edge.source // 2 == agents.rank // 2
        expected = "direct" if same else "neighbor" if remote == "messages" else "staged"
        assert edge.transport == expected
        assert edge.why == (
            "in place, on the same card" if same else
            "on another node; MPI dies of SIGSEGV" if remote == "staged" else "on another node"
        )  # fmt: skip
    run_ahead(exchange, agents, 8)
    end(exchange, agents, 8)


def test_a_slow_link_is_found_by_measuring(comm: MPI.Intracomm) -> None:
    """Links to other cards are measured: these take a microsecond a byte, the card's own less."""
    agents = agents_with(comm, "ring", card=f"card {comm.rank}", slow=1e-6)
    exchange = open_on(agents)
    assert all(edge.why.startswith("fetched, over a link of 0 GB/s") for edge in exchange.edges)
    run_ahead(exchange, agents, 3)
    end(exchange, agents, 3)


def test_a_fast_link_is_read_in_place(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_routing, "_bandwidth", lambda gpu, source, size: 1e12)
    agents = agents_with(comm, "ring", card=f"card {comm.rank}")
    exchange = open_on(agents)
    assert all(edge.why.startswith("in place, over a link of 1000") for edge in exchange.edges)
    end(exchange, agents, 0)


def test_where_memory_cannot_be_imported(
    comm: MPI.Intracomm, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One agent in a container of its own: its edges go another way, on both sides."""
    monkeypatch.setattr(gpu_aware_probe, "_alone", lambda index: "this MPI does not")
    agents = agents_with(comm, "complete", importable=comm.rank != 1)
    with caplog.at_level(logging.INFO, "mpicdsgd"):
        exchange = open_on(agents)
    for edge in exchange.edges:
        isolated = 1 in (edge.source, comm.rank)
        assert edge.transport == ("staged" if isolated else "direct")
    if comm.size > 1 and comm.rank == 0:
        assert "edges staged" in caplog.text
        assert "this MPI does not" in caplog.text
    run_ahead(exchange, agents, 4)
    end(exchange, agents, 4)


def test_where_memory_cannot_be_exported(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in some virtual machines: everything is staged, for the reason that CUDA gives."""
    monkeypatch.setattr(gpu_aware_probe, "_alone", lambda index: "this MPI does not")
    for first in ("event", "memory"):
        agents = agents_with(comm, "ring", exportable="" if first == "event" else "event")
        exchange = open_on(agents)
        for edge in exchange.edges:
            assert edge.transport == "staged"
            assert "CUDA IPC is refused here (not supported (emulated))" in edge.why
        run_ahead(exchange, agents, 3)
        end(exchange, agents, 3)
        agents = agents_with(comm, "ring", exportable="")
        exchange = open_on(agents, "staged")  # which needs none of it
        end(exchange, agents, 0)


def test_a_gpu_without_memory(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    agents = agents_with(comm, "ring")
    if comm.rank == comm.size - 1:

        def fail(size: int) -> int:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(agents.gpu, "malloc", fail)
    with pytest.raises(UserError, match=f"agent {comm.size - 1}'s GPU has no memory"):
        open_on(agents)
    assert agents.gpu.in_use == 0  # type: ignore[union-attr]


def test_a_transport_that_cannot_be_forced(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    if comm.size == 1:
        pytest.skip("one agent has no edge")
    agents = agents_with(comm, "ring", importable=comm.rank != 1)
    with pytest.raises(UserError, match=r"direct.* cannot serve the edge .*use \"auto\""):
        open_on(agents, "direct")
    assert agents.gpu.in_use == 0  # type: ignore[union-attr]
    monkeypatch.setattr(gpu_aware_probe, "_alone", lambda index: "no such thing")
    agents = agents_with(comm, "ring")
    with pytest.raises(UserError, match=r'"neighbor": no such thing; use "auto" or "staged"'):
        open_on(agents, "neighbor")
    assert agents.gpu.in_use == 0  # type: ignore[union-attr]


def test_a_library_that_moves_other_bytes(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What MPI says of itself does not count: the bytes are compared."""
    if comm.size == 1:
        pytest.skip("one agent sends nothing")
    host = np.zeros(64 << 20, np.uint8)
    monkeypatch.setattr(gpu_aware_probe, "device_buffer", lambda address, size: host[:size])
    agents = agents_with(comm, "ring")
    exchange = open_on(agents, "auto")
    assert {edge.transport for edge in exchange.edges} == {"direct"}  # not tried without need
    end(exchange, agents, 0)
    with pytest.raises(UserError, match="moved device memory wrongly"):
        open_on(agents, "neighbor")
    assert agents.gpu.in_use == 0  # type: ignore[union-attr]


def test_faults_and_stops_travel_with_the_tokens(comm: MPI.Intracomm) -> None:
    agents = agents_with(comm, "chain")
    exchange = open_on(agents)
    diameter = agents.graph.diameter
    for step in range(2 * diameter + 3):
        if step == 1 and comm.rank == 0:
            exchange.report(Reason.NON_FINITE, at=0)
            exchange.request_stop()
        exchange.post(step)
        exchange.wait(step)
    assert (exchange.fault.agent, exchange.fault.at) == (0, 0)
    assert exchange.fault.step == exchange.stop_step == 1 + diameter
    exchange.fault_raised = True
    end(exchange, agents, step + 1)


@pytest.mark.parametrize("route", ROUTES)
def test_an_agent_that_leaves(comm: MPI.Intracomm, route: str) -> None:
    if comm.size == 1:
        pytest.skip("one agent has no others")
    agents = agents_with(comm, "ring", main="threaded", seed=comm.rank)
    exchange = open_on(agents, **ROUTES[route])
    run_ahead(exchange, agents, 3)
    exchange.post(3)
    if comm.rank > 0:

        def go_on() -> None:
            for step in range(3, 9):
                exchange.wait(step)
                exchange.post(step + 1)

        with pytest.raises(AgentLeft):
            go_on()
    exchange.close()
    agents.gpu.destroy_stream(MAIN)  # type: ignore[union-attr]
    assert agents.gpu.in_use == 0  # type: ignore[union-attr]


def test_an_agent_that_does_not_post(comm: MPI.Intracomm) -> None:
    if comm.size == 1:
        pytest.skip("one agent waits for nobody")
    agents = agents_with(comm, "ring")
    exchange = open_on(agents)
    exchange._timeout_s = 0.5
    exchange.post(0)
    exchange.wait(0)
    comm.Barrier()
    if comm.rank > 0:
        exchange.post(1)
        if 0 in agents.sources:
            with pytest.raises(AgentMissing, match=r"nothing came from agents \[.*0"):
                exchange.wait(1)
    comm.Barrier()
    exchange._timeout_s = 60.0
    if comm.rank == 0:
        exchange.post(1)
    exchange.wait(1)
    end(exchange, agents, 2)


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float16"])
def test_opened_by_a_config(comm: MPI.Intracomm, wire: str) -> None:
    agents = agents_with(comm, "ring")
    exchange = open_exchange(agents, 37, ExchangeConfig(transport="staged", wire=wire))
    assert {edge.why for edge in exchange.edges} <= {"asked for"}
    blocks = -(-37 * (4 if wire == "float32" else 2) // 64)
    readers = len(agents.destinations)
    assert exchange._carrier.bytes_per_post == 64 * (1 + blocks) * readers
    end(exchange, agents, 0)
    with pytest.raises(UserError, match="transport must be one of auto, direct, neighbor, staged"):
        open_exchange(agents, 37, ExchangeConfig(transport="pigeon"))
    with pytest.raises(UserError, match="prefetch must be one of auto, always, never"):
        open_exchange(agents, 37, ExchangeConfig(prefetch="pigeon"))


def test_an_empty_buffer(comm: MPI.Intracomm) -> None:
    agents = agents_with(comm, "ring")
    for transport in ("direct", "staged", "neighbor"):
        exchange = open_exchange(agents, 0, ExchangeConfig(transport=transport))
        exchange.post(0)
        assert len(exchange.wait(0)) == len(agents.sources)
        end(exchange, agents, 1)


def test_chunks_are_all_that_is_sent() -> None:
    """The chunks of a buffer cover it, once."""
    comm = MPI.COMM_SELF
    agents = agents_with(comm, "ring")
    gpu: Any = agents.gpu
    published = gpu_buffers.DevicePublished(gpu, 1000, "float32", shared=False)
    route = staged.StagedRoute(gpu, comm, published, [((), ())], chunk_bytes=1024)
    assert route._chunks == [(0, 16), (16, 16), (32, 16), (48, 15)]
    route.free()
    published.free()
    assert gpu.in_use == 0

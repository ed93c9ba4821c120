"""The exchange alone: right values on every graph; what it says of agents out of step."""

from __future__ import annotations

import copy
import re
import threading
import time
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from oracle import make_agents

from mpicdsgd import (
    AgentLeft,
    AgentMissing,
    Agents,
    ExchangeConfig,
    ExchangeError,
    Graph,
    OutOfStep,
    UserError,
    from_matrix,
)
from mpicdsgd.comm.exchange import header, shared_memory
from mpicdsgd.comm.exchange.exchange import Exchange
from mpicdsgd.comm.exchange.header import Fault
from mpicdsgd.comm.exchange.opening import open_exchange
from mpicdsgd.comm.exchange.token_transport import TokenCarrier

GRAPHS = [
    "complete", "ring", "chain", "star", "torus", "hypercube", "expo", "one-way", "one-peer",
    "matchings",
]  # fmt: skip


def agents_on(comm: MPI.Intracomm, topology: str, **options: Any) -> Agents:
    if topology == "one-way":  # a directed ring
        n = comm.size
        edges = [(j, (j + 1) % n) for j in range(n if n > 1 else 0)]
        graph = Graph.from_edges(n, edges, directed=True)
        Pi = (np.eye(n) + np.roll(np.eye(n), 1, axis=0)) / 2
        return Agents(comm, from_matrix(Pi if n > 1 else np.eye(1), graph), **options)
    if topology == "one-peer":  # these two change by turns
        return make_agents(comm, "expo", "one-peer", **options)
    if topology == "matchings":
        return make_agents(comm, "complete", "matchings", **options)
    mixing = "uniform" if topology == "expo" else "metropolis"
    return make_agents(comm, topology, mixing, **options)


def pattern(agent: int, step: int, size: int, dtype: Any) -> Any:
    """Values that tell agent, step and place apart."""
    return ((np.arange(size) * 7 + agent * 1000 + step * 31) % 60013).astype(dtype)


def one_round(exchange: Exchange, agents: Agents, step: int, size: int) -> None:
    """Post step ``step`` and see all neighbours' patterns."""
    dtype = exchange.published.dtype
    exchange.published[:] = pattern(agents.rank, step, size, dtype)
    turn = step % len(agents.turns)
    exchange.post(step, turn=turn)
    exchange.progress()
    received = exchange.wait(step)
    for source, buffer in zip(agents.turns[turn].sources, received, strict=True):
        assert np.array_equal(buffer, pattern(source, step, size, dtype))
    assert np.array_equal(exchange.previous, pattern(agents.rank, step, size, dtype))


def close(exchange: Exchange, step: int) -> None:
    """Close with an exchange under way, as an optimizer does."""
    exchange.post(step)
    exchange.close()


@pytest.mark.parametrize("transport", ["direct", "neighbor", "both"])
@pytest.mark.parametrize(
    ("topology", "wire"),
    [(topology, "float32") for topology in GRAPHS] + [("star", "bfloat16"), ("expo", "float16")],
)
def test_values_on_every_graph(
    comm: MPI.Intracomm, topology: str, wire: str, transport: str
) -> None:
    agents = agents_on(comm, topology)
    if transport == "both":  # as if two ranks shared a node
        agents = copy.copy(agents)
        agents.node = agents.rank // 2 * 2
        transport = "auto"
    size = 37  # no multiple of 16
    exchange = open_exchange(agents, size, ExchangeConfig(wire=wire, transport=transport))
    assert exchange.published.shape == (size,)
    assert exchange.published.dtype == (np.float32 if wire == "float32" else np.uint16)
    for step in range(4):
        one_round(exchange, agents, step, size)
    for edge in exchange.edges:
        near = transport == "direct" or edge.source // 2 == agents.rank // 2
        assert edge.transport == ("direct" if near and transport != "neighbor" else "neighbor")
    blocks = -(-size * exchange.published.itemsize // 64)
    told = {*agents.sources, *agents.destinations}  # tokens go both ways
    headers = len(told if isinstance(exchange._carrier, TokenCarrier) else agents.destinations)
    sent = sum(len(agents.turns[k % len(agents.turns)].destinations) for k in range(4))
    assert exchange.bytes_sent == 64 * (4 * headers + blocks * sent)
    close(exchange, 4)


@pytest.mark.parametrize("topology", GRAPHS)
def test_nobody_reads_what_is_being_written(comm: MPI.Intracomm, topology: str) -> None:
    """Agents at very different speeds: what is read in place is still this step's, and whole."""
    agents = agents_on(comm, topology)
    size = 50_000
    exchange = open_exchange(agents, size, ExchangeConfig(transport="direct"))
    pauses = np.random.default_rng(comm.rank)
    for step in range(30):
        time.sleep(pauses.choice([0.0, 0.0, 0.002]))
        exchange.published[:] = comm.rank * 1000 + step
        turn = step % len(agents.turns)
        exchange.post(step, turn=turn)
        received = exchange.wait(step)
        time.sleep(pauses.choice([0.0, 0.0, 0.002]))
        for source, buffer in zip(agents.turns[turn].sources, received, strict=True):
            assert (buffer == source * 1000 + step).all()
    close(exchange, 30)


def test_shared_memory_without_room(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One node has none: then all send messages, which is said; asked for, it is an error."""
    if comm.size == 1:
        pytest.skip("one agent needs none")
    if comm.rank == comm.size - 1:
        monkeypatch.setattr(shared_memory, "_SPARE", 1e9)
    agents = make_agents(comm)
    exchange = open_exchange(agents, 1000, ExchangeConfig())
    assert {edge.transport for edge in exchange.edges} == {"neighbor"}
    if comm.rank == 0:
        assert "/dev/shm has" in caplog.text
    one_round(exchange, agents, 0, 1000)
    close(exchange, 1)
    with pytest.raises(UserError, match=r'"direct": /dev/shm has .* MB left, .*; use "auto"'):
        open_exchange(agents, 1000, ExchangeConfig(transport="direct"))
    apart = copy.copy(agents)
    apart.node = agents.rank
    with pytest.raises(UserError, match=r"are on different nodes; use"):
        open_exchange(apart, 1000, ExchangeConfig(transport="direct"))


@pytest.mark.parametrize("size", [0, 1, 16, 17, 1 << 18, (1 << 18) + 3])
def test_sizes(comm: MPI.Intracomm, size: int) -> None:
    """From nothing to 1 MB; every buffer begins at a cache line."""
    agents = agents_on(comm, "star")
    exchange = open_exchange(agents, size, ExchangeConfig())
    for step in range(3):
        one_round(exchange, agents, step, size)
    assert size == 0 or exchange.published.ctypes.data % 64 == 0
    close(exchange, 3)


def test_neighbours_buffers_stay_until_the_next_post(comm: MPI.Intracomm) -> None:
    agents = agents_on(comm, "ring")
    exchange = open_exchange(agents, 5, ExchangeConfig())
    exchange.published[:] = agents.rank
    exchange.post(0)
    received = exchange.wait(0)
    exchange.published[:] = -1.0  # free again
    comm.Barrier()
    assert [buffer.tolist() for buffer in received] == [[float(s)] * 5 for s in agents.sources]
    close(exchange, 1)


def test_two_exchanges_in_another_order_on_every_rank(comm: MPI.Intracomm) -> None:
    """Each has messages of its own: what one posts never comes out of the other."""
    agents = agents_on(comm, "ring")
    first = open_exchange(agents, 9, ExchangeConfig())
    second = open_exchange(agents, 9, ExchangeConfig())
    for step in range(4):
        order = [first, second] if (comm.rank + step) % 2 else [second, first]
        for exchange in order:
            exchange.published[:] = agents.rank + (100 if exchange is first else 200)
            exchange.post(step)
        for exchange in reversed(order):
            offset = 100 if exchange is first else 200
            got = [float(buffer[0]) for buffer in exchange.wait(step)]
            assert got == [source + offset for source in agents.sources]
    for exchange in [first, second]:
        close(exchange, 4)


def test_opening_and_closing_thirty_times(comm: MPI.Intracomm) -> None:
    agents = agents_on(comm, "ring")
    for turn in range(30):
        exchange = open_exchange(agents, 8, ExchangeConfig())
        one_round(exchange, agents, turn, 8)
        if turn % 2:
            exchange.post(turn + 1)
        exchange.close()
        exchange.close()  # does nothing


def test_closing_without_any_step(comm: MPI.Intracomm) -> None:
    open_exchange(agents_on(comm, "star"), 8, ExchangeConfig()).close()


def run_until_error(exchange: Exchange, start: int, steps: int) -> ExchangeError | None:
    """Wait and post as a training loop does; the error that ends it."""
    try:
        for step in range(start, start + steps):
            exchange.wait(step)
            exchange.post(step + 1)
    except ExchangeError as error:
        return error
    return None


@pytest.mark.parametrize("topology", ["complete", "ring", "chain", "star"])
def test_who_goes_on_is_told_who_left_first(comm: MPI.Intracomm, topology: str) -> None:
    """Rank 0 takes 2 steps, the last one 3, the others would take 6."""
    if comm.size == 1:
        pytest.skip("nobody else could leave")
    agents = agents_on(comm, topology)
    exchange = open_exchange(agents, 4, ExchangeConfig(timeout_s=60))
    exchange.post(0)
    steps = {0: 2, comm.size - 1: 3}.get(comm.rank, 6)
    error = run_until_error(exchange, 0, steps)
    exchange.close()
    if comm.rank in (0, comm.size - 1):
        assert error is None
    else:
        assert isinstance(error, AgentLeft)
        # Word of agent 0 may not have come as far as the last one's neighbours.
        far = topology in ("ring", "chain")
        others = f"|agent {comm.size - 1} left after step 3" if far else ""
        assert re.match("agent 0 left after step 2" + others, str(error))
        assert "same number of steps" in str(error)


def test_of_two_that_leave_at_once_the_first_is_named(comm: MPI.Intracomm) -> None:
    if comm.size < 3:
        pytest.skip("somebody has to go on")
    agents = agents_on(comm, "complete")
    exchange = open_exchange(agents, 4, ExchangeConfig(timeout_s=60))
    exchange.post(0)
    leaves = comm.rank in (0, comm.size - 1)
    error = run_until_error(exchange, 0, 2 if leaves else 6)
    exchange.close()
    if not leaves:
        assert isinstance(error, AgentLeft)
        assert str(error).startswith("agent 0 left after step 2")


def test_one_rank_publishes_while_the_others_step(comm: MPI.Intracomm) -> None:
    """publish() repeats step 2 on rank 0, so it is a step behind from then on."""
    if comm.size == 1:
        pytest.skip("one agent is always in step")
    agents = agents_on(comm, "ring")
    exchange = open_exchange(agents, 4, ExchangeConfig(timeout_s=60))
    exchange.post(0)
    assert run_until_error(exchange, 0, 2) is None
    exchange.wait(2)
    behind = comm.rank == 0
    exchange.post(2 if behind else 3)
    error = run_until_error(exchange, 2 if behind else 3, 6)
    exchange.close()
    assert isinstance(error, OutOfStep | AgentLeft)
    if comm.rank == 0:
        assert isinstance(error, OutOfStep)
        assert "is at step 3, agent 0 at step 2" in str(error)
    elif 0 in agents.sources:
        assert isinstance(error, OutOfStep)
        assert f"agent 0 is at step 2, agent {comm.rank} at step 3" in str(error)


def test_another_number_of_mixing_rounds(comm: MPI.Intracomm) -> None:
    if comm.size == 1:
        pytest.skip("one agent is always in step")
    exchange = open_exchange(agents_on(comm, "complete"), 4, ExchangeConfig(timeout_s=60))
    exchange.post(1, 1 if comm.rank == 0 else 0)
    with pytest.raises(OutOfStep):
        exchange.wait(1, 1 if comm.rank == 0 else 0)
    exchange.close()


def test_an_agent_of_an_earlier_generation(comm: MPI.Intracomm) -> None:
    if comm.size == 1:
        pytest.skip("one agent is always of its generation")
    agents = agents_on(comm, "complete", timeout_s=60)  # its own, as it is changed here
    agents.generation = 3 if comm.rank == 0 else 4
    exchange = open_exchange(agents, 4, ExchangeConfig(timeout_s=60))
    exchange.post(0)
    with pytest.raises(OutOfStep, match="agent 0 is of generation 3" if comm.rank else "of 3"):
        exchange.wait(0)
    exchange.close()


def test_the_timeout_names_who_is_missing(comm: MPI.Intracomm) -> None:
    """The last rank comes no further than its first post."""
    if comm.size == 1:
        pytest.skip("one agent waits for nobody")
    agents = agents_on(comm, "complete")
    exchange = open_exchange(agents, 4, ExchangeConfig(timeout_s=1.0))
    comm.Barrier()
    exchange.post(0)
    exchange.wait(0)
    last = comm.size - 1
    if comm.rank != last:
        exchange.post(1)
        with pytest.raises(AgentMissing, match=rf"waited 1 s after step 1.*agents \[{last}\]"):
            exchange.wait(1)
    comm.Barrier()
    exchange.close()


def test_close_waits_no_longer_than_the_timeout(comm: MPI.Intracomm) -> None:
    """The last rank neither goes on nor closes, until the others have given up."""
    if comm.size == 1:
        pytest.skip("one agent waits for nobody")
    exchange = open_exchange(agents_on(comm, "complete"), 4, ExchangeConfig(timeout_s=1.5))
    comm.Barrier()
    exchange.post(0)
    exchange.wait(0)
    last = comm.size - 1
    if comm.rank != last:
        exchange.post(1)
        with pytest.raises(AgentMissing, match=r"waited 1\.5 s"):
            exchange.close()
    comm.Barrier()
    if comm.rank == last:
        with pytest.raises(AgentMissing, match=r"waited 1\.5 s"):
            exchange.close()


def test_wait_needs_a_post(comm: MPI.Intracomm) -> None:
    exchange = open_exchange(agents_on(comm, "ring"), 4, ExchangeConfig())
    exchange.post(0)
    exchange.wait(0)
    with pytest.raises(RuntimeError, match="no exchange is under way"):
        exchange.wait(0)
    exchange.close()


def test_settings_on_one_rank(comm: MPI.Intracomm) -> None:
    agents = make_agents(comm)
    last = comm.rank == comm.size - 1

    def refused(match: str, **settings: Any) -> None:
        with pytest.raises(UserError, match=match):
            open_exchange(agents, 4, ExchangeConfig(**(settings if last else {})))

    refused('wire must be one of float32, bfloat16, float16, got "float8"', wire="float8")
    refused('transport must be one of auto, direct, .* got "pigeon"', transport="pigeon")
    refused('"staged" is for GPUs, .*: use "auto", "direct" or "neigh', transport="staged")
    refused("timeout_s must be positive, got 0", timeout_s=0)
    if comm.size > 1:
        refused("must be the same on all ranks", wire="bfloat16")


def test_nothing_is_wrong_at_first(comm: MPI.Intracomm) -> None:
    exchange = open_exchange(make_agents(comm), 4, ExchangeConfig())
    assert exchange.fault == Fault()
    assert exchange.stop_step > 10**15
    assert (exchange.wait_s, exchange.bytes_sent) == (0.0, 0)
    exchange.close()


@pytest.mark.parametrize("transport", ["direct", "neighbor", "both"])
@pytest.mark.parametrize("topology", ["one-peer", "matchings"])
def test_turns_with_one_agent_behind(comm: MPI.Intracomm, topology: str, transport: str) -> None:
    """It publishes while the others step, so they are at another turn: told, nothing swapped."""
    if comm.size < 3:
        pytest.skip("needs two turns")
    agents = agents_on(comm, topology)
    if transport == "both":
        agents = copy.copy(agents)
        agents.node = agents.rank // 2 * 2
        transport = "auto"
    size = 1 << 20  # beyond what MPI sends unasked
    exchange = open_exchange(agents, size, ExchangeConfig(transport=transport, timeout_s=60))
    for step in range(3):
        one_round(exchange, agents, step, size)
    step = 2 if comm.rank == 0 else 3
    errors = (OutOfStep, AgentLeft)
    with pytest.raises(errors):  # noqa: PT012, who is no peer of agent 0 hears of it later
        for _ in range(9):
            exchange.published[:] = pattern(agents.rank, step, size, np.float32)
            exchange.post(step, turn=step % len(agents.turns))
            exchange.wait(step)
            step += 1
    exchange.close()


@pytest.mark.parametrize("transport", ["direct", "neighbor"])
@pytest.mark.parametrize("topology", ["one-peer", "matchings"])
def test_turns_until_somebody_leaves(comm: MPI.Intracomm, topology: str, transport: str) -> None:
    if comm.size == 1:
        pytest.skip("nobody else could leave")
    agents = agents_on(comm, topology)
    exchange = open_exchange(agents, 4, ExchangeConfig(transport=transport, timeout_s=60))
    exchange.post(0)
    error = None
    try:
        for step in range(2 if comm.rank == 0 else 9):
            exchange.wait(step)
            exchange.post(step + 1, turn=(step + 1) % len(agents.turns))
    except AgentLeft as left:
        error = left
    exchange.close()
    assert comm.rank == 0 or "agent 0 left after step 2" in str(error)


@pytest.mark.parametrize("progress", ["thread", "hooks"])
def test_who_moves_the_messages(comm: MPI.Intracomm, progress: str) -> None:
    """Large ones come in while nobody calls, by the thread; by the hooks when they call."""
    agents = agents_on(comm, "ring")
    config = ExchangeConfig(transport="neighbor", progress=progress, timeout_s=60)
    size = 1 << 21
    exchange = open_exchange(agents, size, config)
    threads = [t.name for t in threading.enumerate()]
    assert ("mpicdsgd exchange" in threads) == (progress == "thread")
    for step in range(5):
        exchange.published[:] = pattern(agents.rank, step, size, np.float32)
        exchange.post(step)
        carrier: Any = exchange._carrier
        end = time.monotonic() + 60
        while any(header.read(slot) is None for slot in carrier.headers):
            assert time.monotonic() < end, "nothing comes in"
            time.sleep(1e-3)
            if progress == "hooks":
                exchange.progress()
        received = exchange.wait(step)
        for source, buffer in zip(agents.sources, received, strict=True):
            assert np.array_equal(buffer, pattern(source, step, size, np.float32))
    close(exchange, 5)
    assert "mpicdsgd exchange" not in [t.name for t in threading.enumerate()]


def test_when_there_is_a_thread(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where something goes by messages, and MPI is ready for several threads."""

    def threads(transport: str) -> int:
        exchange = open_exchange(agents, 8, ExchangeConfig(transport=transport))
        names = [t.name for t in threading.enumerate()]
        exchange.close()
        return names.count("mpicdsgd exchange")

    agents = agents_on(comm, "ring")
    assert threads("direct") == 0
    assert threads("neighbor") == (comm.size > 1)
    monkeypatch.setattr(MPI, "Query_thread", lambda: MPI.THREAD_SERIALIZED)
    assert threads("neighbor") == 0
    with pytest.raises(UserError, match=r'"thread": MPI was started without .*; use "auto"'):
        open_exchange(agents, 8, ExchangeConfig(progress="thread"))
    with pytest.raises(UserError, match=r"exchange\.progress must be one of"):
        open_exchange(agents, 8, ExchangeConfig(progress="threads"))


def test_what_the_thread_meets_is_raised_in_wait(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = agents_on(comm, "ring")
    exchange = open_exchange(agents, 8, ExchangeConfig(progress="thread", timeout_s=60))
    broken = threading.Event()

    def advance() -> bool:
        broken.set()
        raise OSError("the network is down")

    exchange._helper._advance = advance  # type: ignore[union-attr]
    exchange.post(0)
    assert broken.wait(60)
    with pytest.raises(OSError, match="the network is down"):
        exchange.wait(0)
    exchange.close()

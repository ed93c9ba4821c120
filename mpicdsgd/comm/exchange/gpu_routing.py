"""Which way each edge's values go between GPUs, agreed on by all agents, and opening those routes.

On a node an edge is *direct* where both ends could import what they need of the other; where they
could not (no peer access, a container's or a launcher's isolation), and between nodes, it is
*neighbor* where `gpu_aware_probe` saw this MPI library move device memory right, else *staged*.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange import gpu_aware_probe
from mpicdsgd.comm.exchange.cuda_ipc import DirectRoute, Imported, release
from mpicdsgd.comm.exchange.gpu_buffers import DevicePublished, Handles
from mpicdsgd.comm.exchange.messages import along
from mpicdsgd.comm.exchange.staged import CHUNK_BYTES, MessageRoute, StagedRoute
from mpicdsgd.comm.exchange.token_transport import Route, TokenCarrier, peers_of
from mpicdsgd.comm.exchange.transport import Edge
from mpicdsgd.common.errors import UserError
from mpicdsgd.kernels.gpu import Gpu

log = logging.getLogger("mpicdsgd")

TRANSPORTS = ("auto", "direct", "neighbor", "staged")
PREFETCH = ("auto", "always", "never")

_PROBED_BYTES = 32 << 20  # of a link, to see how fast it is
_SLOW = 0.5  # of the card's own copies: below, fetching beside the backward pass pays


@dataclass(frozen=True)
class _Offer:
    """What an agent shows the others at opening."""

    node: int
    card: str
    handles: Handles | None
    refused: str


@dataclass(frozen=True)
class _Found:
    """What the agents have shown each other, and could import.

    Attributes:
        offers: by agent.
        imports: what of its peers this agent has imported; goes on to the routes, or is released.
        failures: why what other peers on this node offer could not be imported.
        reached: by agent, whose it has imported.
    """

    offers: list[_Offer]
    imports: dict[int, Imported]
    failures: dict[int, str]
    reached: list[frozenset[int]]

    def why_not_direct(self, source: int, reader: int) -> str:
        """Why the edge cannot be direct, as far as this agent knows; "" where it can."""
        if self.offers[source].node != self.offers[reader].node:
            return "on another node"
        if source not in self.reached[reader] or reader not in self.reached[source]:
            other = "the other end could not import this one's"
            return self.failures.get(source) or self.failures.get(reader) or other
        return ""


def open_device_carrier(
    agents: Agents,
    gpu: Gpu,
    size: int,
    wire: str,
    transport: str,
    prefetch: str,
    chunk_bytes: int = CHUNK_BYTES,
) -> TokenCarrier:
    """The carrier with a route for every edge. Collective over the agents.

    Args:
        transport: one of `TRANSPORTS`; all but "auto" are forced upon every edge.
        prefetch: one of `PREFETCH`, for direct edges.
        chunk_bytes: of a staged transfer.

    Raises:
        UserError: on every rank, where a forced transport cannot serve an edge.
    """
    published = _publish(agents, gpu, size, wire, transport in ("auto", "direct"))
    found = _meet(agents, gpu, published, transport)
    everywhere = [(s, r) for r in range(agents.size) for s in agents.graph.sources[r]]
    forced = transport not in ("auto", "direct")
    direct = {e for e in everywhere if not forced and not found.why_not_direct(*e)}
    rest = [e for e in everywhere if e not in direct]
    refused, error = _refusals(agents, gpu, found, rest, transport)
    if error:
        release(gpu, found.imports)
        agents.comm.Barrier()  # what is freed must not be mapped anywhere
        published.free()
    with agents.agreement("exchange.transport"):
        if error:
            raise UserError(error)
    by_message = bool(rest) and transport in ("auto", "neighbor") and not refused

    me = agents.rank
    mine = tuple(s for s in agents.sources if (s, me) in direct)
    others = set(mine) | {r for r in agents.destinations if (me, r) in direct}
    kept = {peer: found.imports.pop(peer) for peer in others}
    release(gpu, found.imports)
    speeds = _speeds(agents, gpu, published, kept, mine, found.offers, prefetch)
    fetched = [s for s in mine if speeds[s][0]]
    everyone = [turn.sources for turn in agents.turns]
    routes: list[Route] = [DirectRoute(gpu, published, mine, everyone, kept, fetched)]
    if rest:
        routes.append(_indirect(agents, gpu, published, rest, None if by_message else chunk_bytes))
    edges = []
    for source in agents.sources:
        if source in mine:
            edges.append(Edge(source, "direct", speeds[source][1]))
        else:
            asked = found.why_not_direct(source, me) if transport == "auto" else "asked for"
            way = "neighbor" if by_message else "staged"
            edges.append(Edge(source, way, f"{asked}; {refused}" if refused else asked))
    carrier = TokenCarrier(agents, published, routes, edges)
    _say(agents, edges)
    return carrier


def _publish(agents: Agents, gpu: Gpu, size: int, wire: str, shared: bool) -> DevicePublished:
    """This agent's buffers, or an error on every rank where one has no room. Collective."""
    made: list[DevicePublished] = []
    try:
        with agents.agreement("the GPU's memory"):
            try:
                made.append(DevicePublished(gpu, size, wire, shared=shared))
            except Exception as failure:
                raise UserError(
                    f"agent {agents.rank}'s GPU has no memory for the published buffers ({failure})"
                ) from failure
    except UserError:
        for published in made:
            published.free()
        raise
    return made[0]


def _meet(agents: Agents, gpu: Gpu, published: DevicePublished, transport: str) -> _Found:
    """Show the others what is here, and import what they show. Collective."""
    offer = _Offer(agents.node, gpu.identity, published.handles, published.refused)
    offers: list[_Offer] = agents.comm.allgather(offer)
    imports, failures = _import(agents, gpu, offers, transport)
    return _Found(offers, imports, failures, agents.comm.allgather(frozenset(imports)))


def _refusals(
    agents: Agents, gpu: Gpu, found: _Found, rest: list[tuple[int, int]], transport: str
) -> tuple[str, str]:
    """Why MPI must not move device memory, and why ``transport`` cannot be. Collective.

    Each "" where nothing speaks against it, or it was not asked for.
    """
    if rest and transport == "direct":
        texts = agents.comm.allgather([found.why_not_direct(*edge) for edge in rest])
        source, reader = rest[0]
        return "", (
            f'exchange.transport = "direct" cannot serve the edge from agent {source} to agent '
            f'{reader}: {texts[reader][0]}; use "auto"'
        )
    refused = error = ""
    if rest and transport in ("auto", "neighbor"):
        refused = gpu_aware_probe.why_not(agents, gpu)
        if refused and transport == "neighbor":
            error = f'exchange.transport = "neighbor": {refused}; use "auto" or "staged"'
    return refused, error


def _import(
    agents: Agents, gpu: Gpu, offers: list[_Offer], transport: str
) -> tuple[dict[int, Imported], dict[int, str]]:
    """The peers on this node whose memory (of sources) and events are here, and why not."""
    imports: dict[int, Imported] = {}
    failures: dict[int, str] = {}
    if transport in ("auto", "direct"):
        for peer in peers_of(agents):
            offer = offers[peer]
            if offer.node != agents.node:
                continue
            memory: int = 0
            events: list[int] = []
            try:
                if offer.handles is None:
                    raise RuntimeError(offer.refused)
                if peer in agents.sources:
                    memory = gpu.import_memory(offer.handles.memory)
                for handle in offer.handles.events:
                    events.append(gpu.import_event(handle))
                imports[peer] = Imported(memory, tuple(events))
            except Exception as error:  # whatever CUDA says, there is another way
                release(gpu, {peer: Imported(memory, tuple(events))})
                failures[peer] = f"agent {peer}'s memory cannot be imported ({error})"
    return imports, failures


def _indirect(
    agents: Agents,
    gpu: Gpu,
    published: DevicePublished,
    edges: list[tuple[int, int]],
    chunk_bytes: int | None,
) -> Route:
    """The route of edges that are not direct: by messages of device memory, or staged in chunks."""
    me = agents.rank
    turns = along(agents, [s for s, r in edges if r == me], [r for s, r in edges if s == me])
    if chunk_bytes is None:
        return MessageRoute(gpu, agents.comm, published, turns)
    return StagedRoute(gpu, agents.comm, published, turns, chunk_bytes)


def _speeds(
    agents: Agents,
    gpu: Gpu,
    published: DevicePublished,
    peers: Mapping[int, Imported],
    sources: tuple[int, ...],
    offers: list[_Offer],
    prefetch: str,
) -> dict[int, tuple[bool, str]]:
    """Whether to fetch each direct source's values beforehand, and why. Local.

    A link is measured where the source is on another card, by copies of a part of its buffers.
    """
    found: dict[int, tuple[bool, str]] = {}
    own = 0.0
    for source in sources:
        if prefetch != "auto":
            always = prefetch == "always"
            found[source] = always, "fetched, as asked for" if always else "in place, as asked for"
        elif offers[source].card == gpu.identity:
            found[source] = False, "in place, on the same card"
        else:
            size = min(_PROBED_BYTES, 2 * published.size_bytes)
            own = own or _bandwidth(gpu, published.memory, size)
            link = _bandwidth(gpu, peers[source].memory, size)
            slow = link < _SLOW * own
            how = "fetched" if slow else "in place"
            measured = f"{link / 1e9:.0f} GB/s (the card's own copies: {own / 1e9:.0f} GB/s)"
            found[source] = slow, f"{how}, over a link of {measured}"
    return found


def _bandwidth(gpu: Gpu, source: int, size_bytes: int) -> float:
    """Bytes per second of copies from ``source``, the best of three."""
    to = gpu.malloc(size_bytes)
    stream = gpu.new_stream()
    begin, end = gpu.event(timing=True), gpu.event(timing=True)
    best_s = np.inf
    for _ in range(4):  # the first one maps what is not mapped yet
        gpu.record(begin, stream)
        gpu.copy(to, source, size_bytes, stream)
        gpu.record(end, stream)
        gpu.synchronize(end)
        best_s = min(best_s, max(gpu.elapsed_s(begin, end), 1e-9))
    for event in (begin, end):
        gpu.destroy_event(event)
    gpu.destroy_stream(stream)
    gpu.free(to)
    return float(size_bytes / best_s)


def _say(agents: Agents, edges: list[Edge]) -> None:
    """Log how many edges go which way, and the commonest reason; `mpicdsgd info` has them all."""
    table: list[list[Edge]] = agents.comm.gather(edges, root=0) or []
    reasons: dict[str, Counter[str]] = {}
    for edge in (edge for row in table for edge in row):
        reasons.setdefault(edge.transport, Counter())[edge.why] += 1
    for transport, counts in sorted(reasons.items()):
        why = counts.most_common(1)[0][0]
        level = logging.WARNING if transport == "staged" and why != "asked for" else logging.INFO
        mostly = ", mostly" if len(counts) > 1 else ""
        log.log(level, "%d edges %s%s: %s", counts.total(), transport, mostly, why)

"""The exchange between GPUs, played through on a simulated machine in many orders of events.

What `exchange.device`, `direct`, `staged` and `engine` do with streams, events, tokens and messages
stands here once more, without MPI or a GPU. Hosts, streams and messages go on one at a time, as a
scheduler pleases. Memory knows its version, (agent, post), and who is at it: using what another
writes, reading another version than this step's, freed memory and a deadlock are each a `Race`.
That the simulation sees races is shown by protocols with one thing left out.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any

import pytest
from simulation import (
    NEVER,
    NOW,
    PARTS,
    Access,
    Check,
    Host,
    Memory,
    Race,
    Record,
    Stream,
    Until,
    copy,
    parts,
)

KINDS = ("direct", "fetched", "staged", "device")


class World:
    """Agents on ``routes``, the kind of every edge; ``but``: what is left out of the protocol."""

    def __init__(self, n: int, routes: dict[tuple[int, int], str], but: str, rng: Any) -> None:
        self.n, self.routes, self.but, self.rng, self.steps = n, routes, but, rng, 4
        self.publishes = {step for step in range(self.steps) if rng.random() < 0.2}
        self.leaver = rng.randrange(4 * n)  # who takes fewer steps, if it is somebody
        self.streams: list[Stream] = []
        self.marks: defaultdict[Any, Record] = defaultdict(Record)
        self.met: Counter[str] = Counter()
        self.agents = [Agent(self, rank) for rank in range(n)]

    def play(self) -> None:
        hosts = [Host(agent.life()) for agent in self.agents]
        speed: defaultdict[Any, float] = defaultdict(lambda: 10 ** self.rng.uniform(-2, 2))
        while True:
            busy = [stream for stream in self.streams if stream.queue]
            while any(stream.settle() for stream in busy):
                pass
            ready = [actor for actor in (*hosts, *busy) if actor.ready()]
            if not ready:
                break
            if self.rng.random() < 0.05:
                speed.pop(self.rng.choice(ready), None)
            self.rng.choices(ready, [speed[actor] for actor in ready])[0].go()
        if not all(host.over for host in hosts):
            raise Race("deadlock")
        assert all(agent.x.version[1] >= self.steps - 2 for agent in self.agents)

    def meet(self, name: str) -> Check:
        """A barrier."""
        self.met[name] += 1
        return lambda: self.met[name] == self.n


class Agent:
    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank = world, rank
        self.sources = {s: kind for (s, r), kind in world.routes.items() if r == rank}
        self.readers = {r: kind for (s, r), kind in world.routes.items() if s == rank}
        self.peers = {**self.sources, **self.readers}
        if world.but == "tokens only along edges":
            self.peers = self.sources
        self.x, self.sent, self.published = Memory(), parts(), [parts(), parts()]
        if world.but == "one buffer":
            self.published = 2 * self.published[:1]
        self.near = {source: parts() for source in self.sources}
        self.received = {source: parts() for source in self.sources}
        self.events: list[Record | None] = [None, None]
        self.fetched: Record | None = None  # recorded last on `fetch`, and `here` on `up`
        self.here: Record | None = None
        self.mains = [Stream(), Stream()]  # the user's stream may change from step to step
        self.stream = self.mains[0]
        self.fetch, self.down, self.up = Stream(), Stream(), Stream()
        world.streams += [*self.mains, self.fetch, self.down, self.up]
        self.tokens: list[bool] = []  # sent; whether they said that this agent left
        self.calls: Counter[str] = Counter()
        self.posts = 0
        self.errands: list[Host] = []

    def life(self) -> Until:
        self.give_pass([])
        yield from self.post()
        for step in range(self.world.steps - 2 * (self.rank == self.world.leaver)):
            for _ in range(self.world.rng.randrange(3)):  # gradient hooks
                yield NOW
                self.advance()
            yield from self.complete(NEVER)
            if any(self.world.agents[peer].tokens[step] for peer in self.peers):
                break  # AgentLeft
            self.stream = self.world.rng.choice(self.mains)
            neighbours = self.take(step)
            yield self.give_pass([] if step in self.world.publishes else neighbours)
            yield from self.post()
        yield from self.close()

    def give_pass(self, neighbours: list[tuple[Memory, Any]]) -> Check:
        n = self.posts
        before = (self.x, (self.rank, n - 1) if n else None)
        own = [(memory, (self.rank, n)) for memory in (self.x, *self.published[n % 2])]
        self.stream.queue.append(Access([before, *neighbours], own))
        return NOW if neighbours else self.stream.record().is_done  # publish() waits for it

    def unless(self, but: str, stream: Stream, *records: Record | None) -> None:
        for record in records if self.world.but != but else ():
            stream.wait(record)

    def post(self, leaving: bool = False) -> Until:
        n, early = self.posts, self.world.but == "token before record"
        self.posts += 1
        self.tokens += [leaving] if early else []
        yield NOW
        own = self.events[n % 2] = self.stream.record()
        if self.world.but == "one event":
            self.events = [own, own]
        yield NOW
        self.errands = [Host(self.listen(n))]
        if "fetched" in self.sources.values():
            self.unless("copies do not wait for the pass", self.fetch, own)
        if "staged" in self.world.routes.values():
            self.unless("way down does not wait", self.down, own)
            self.unless("way down does not wait for the way up", self.down, self.here)
            self.unless("way up does not wait", self.up, own)
            on_host, requests = [], list[Check]()
            for part, to in zip(self.published[n % 2], self.sent, strict=True):
                self.down.queue.append(copy([part], [to]))
                on_host.append(self.down.record())
            self.errands += [Host(self.send(on_host, requests)), Host(self.receive(requests))]
        if "device" in self.world.routes.values():
            self.errands.append(Host(self.send_device(n, own)))
        self.tokens += [] if early else [leaving]

    def listen(self, n: int) -> Until:
        agents = self.world.agents
        yield lambda: all(len(agents[peer].tokens) > n for peer in self.peers)
        for source in of("fetched", self.sources):
            its = agents[source].events[n % 2]
            self.unless("copies do not wait for the source", self.fetch, its)
            self.fetch.queue.append(copy(agents[source].published[n % 2], self.near[source]))
            self.fetched = self.fetch.record()

    def send(self, on_host: list[Record], requests: list[Check]) -> Until:
        for part, record in zip(self.sent, on_host, strict=True):
            yield record.is_done if self.world.but != "chunks do not wait" else NOW
            requests.append(self.call("staged", [part]))

    def receive(self, requests: list[Check]) -> Until:
        for i in PARTS:
            yield lambda i=i: len(requests) > i and requests[i]()  # type: ignore[misc]
            for source in of("staged", self.sources):
                self.up.queue.append(copy([self.received[source][i]], [self.near[source][i]]))
        self.here = self.up.record()

    def send_device(self, n: int, own: Record) -> Until:
        yield own.is_done if self.world.but != "MPI does not wait" else NOW
        yield self.call("device", self.published[n % 2])

    def call(self, kind: str, sent: list[Memory]) -> Check:
        """A nonblocking neighbourhood collective along edges of ``kind``; whether it is over."""
        k, me, marks = self.calls[kind], self.rank, self.world.marks
        self.calls[kind] += 1
        marks["posted", kind, me, k].done = True
        mine = [marks["arrived", kind, s, me, k] for s in of(kind, self.sources)]
        for reader in of(kind, self.readers):
            agent, message, wire = self.world.agents[reader], [Memory() for _ in sent], Stream()
            to = [agent.received[me][k % len(PARTS)]] if kind == "staged" else agent.near[me]
            wire.queue.append(copy(sent, message))
            mine.append(wire.record())
            wire.wait(marks["posted", kind, reader, k])
            wire.queue += [copy(message, to), ("record", marks["arrived", kind, me, reader, k])]
            self.world.streams.append(wire)
        return lambda: all(record.done for record in mine)

    def take(self, n: int) -> list[tuple[Memory, Any]]:
        """Make the stream wait; the memory that the pass reads, and what it must find there."""
        agents, near = self.world.agents, ("direct", "fetched")
        self.unless("no wait for the last stream", self.stream, self.events[n % 2])
        readers = {} if self.peers is self.sources else self.readers
        for peers, name in ((self.sources, "sources"), (readers, "readers")):
            its = [agents[p].events[n % 2] for p, kind in peers.items() if kind in near]
            self.unless(f"no wait for {name}", self.stream, *its)
        self.unless("no wait for copies", self.stream, self.fetched, self.here)
        return [
            (memory, (s, n))
            for s, kind in self.sources.items()
            for memory in (agents[s].published[n % 2] if kind == "direct" else self.near[s])
        ]

    def advance(self) -> None:
        for errand in self.errands:
            if errand.ready():
                errand.go()

    def complete(self, enough: Check) -> Until:
        while not (enough() or all(errand.over for errand in self.errands)):
            yield lambda: enough() or any(errand.ready() for errand in self.errands)
            self.advance()

    def close(self) -> Until:
        """As `engine.Exchange.drain`, with no grace before saying that this agent left."""
        if self.world.but == "closing on another stream":
            self.stream = self.mains[0]
        everybody_closes = self.world.meet("closing")
        while not everybody_closes():
            yield from self.complete(everybody_closes)
            if not everybody_closes():
                yield from self.post(leaving=True)
        yield self.world.meet("posts are counted")
        most = max(agent.posts for agent in self.world.agents)
        yield from self.complete(NEVER)
        while self.posts < most:
            yield from self.post(leaving=True)
            yield from self.complete(NEVER)
        streams = (self.stream, self.fetch, self.down, self.up)
        yield lambda: not any(stream.queue for stream in streams)
        settled = self.world.meet("settled")
        yield settled if self.world.but != "no barrier before freeing" else NOW
        for memory in sum((*self.published, *self.near.values(), self.sent), [self.x]):
            if memory.readers or memory.written:
                raise Race("freed in use")
            memory.freed = True


def of(kind: str, peers: dict[int, str]) -> list[int]:
    return [peer for peer, its in peers.items() if its == kind]


def play(shape: str, n: int, kind: str, seed: int, but: str = "") -> None:
    rng = random.Random(f"{shape} {n} {kind} {seed}")
    everyone = range(n)
    ring = {(i, (i + 1) % n) for i in everyone}
    edges = {
        "directed ring": ring,
        "directed": ring | {(s, r) for s in everyone for r in everyone if rng.random() < 0.3},
        "ring": ring | {(r, s) for s, r in ring},
        "chain": {(s, r) for s in everyone for r in everyone if abs(s - r) == 1},
        "star": {(s, r) for s in everyone for r in everyone if s * r == 0},
        "complete": {(s, r) for s in everyone for r in everyone},
    }[shape]
    edges -= {(i, i) for i in everyone}
    routes = {e: rng.choice(KINDS) if kind == "mixed" else kind for e in sorted(edges)}
    World(n, routes, but, rng).play()


SHAPES = ("directed ring", "directed", "ring", "chain", "star", "complete")


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_pass_reads_what_it_must_and_all_come_to_an_end(shape: str, kind: str) -> None:
    for n in range(1, 6):
        for seed in range(4):
            play(shape, n, kind, seed)


@pytest.mark.parametrize(
    ("but", "shape", "kind"),
    [
        ("tokens only along edges", "directed ring", "direct"),
        ("token before record", "ring", "direct"),
        ("no wait for sources", "directed ring", "direct"),
        ("no wait for readers", "directed ring", "direct"),
        ("no wait for readers", "directed", "fetched"),
        ("no wait for the last stream", "ring", "direct"),
        ("one buffer", "ring", "direct"),
        ("no wait for copies", "ring", "fetched"),
        ("no wait for copies", "ring", "staged"),
        ("copies do not wait for the pass", "ring", "fetched"),
        ("copies do not wait for the source", "ring", "fetched"),
        ("way down does not wait", "ring", "staged"),
        ("way down does not wait for the way up", "chain", "staged"),
        ("chunks do not wait", "ring", "staged"),
        ("MPI does not wait", "ring", "device"),
        ("closing on another stream", "ring", "direct"),
        ("no barrier before freeing", "ring", "direct"),
    ],
)
def test_a_race_is_seen_with(but: str, shape: str, kind: str) -> None:
    def plays() -> None:
        for seed in range(300):
            play(shape, 3, kind, seed, but)

    with pytest.raises(Race):
        plays()


# One event for both buffers: a peer may have recorded its next post, and is waited for too long,
# but what it recorded is later than what was meant. Way up: a chunk is sent only when its way down
# is over, which is after the pass.
@pytest.mark.parametrize("but", ["one event", "way up does not wait"])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_race_with(but: str, shape: str) -> None:
    for kind in (*KINDS, "mixed"):
        for seed in range(4):
            play(shape, 3, kind, seed, but)

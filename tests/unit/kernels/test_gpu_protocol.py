"""The exchange between GPUs, played through on a simulated machine in many orders of events.

What `gpu_buffers`, `cuda_ipc`, `staged`, `messages`, `token_transport` and `exchange` do with
streams, events, tokens and messages stands here once more, without MPI or a GPU. Hosts, streams and
messages go on one at a time, as a scheduler pleases. Memory knows its version, (agent, post,
mixing), and who is at it. A `Race` is: using what another writes, reading another version than this
mixing's, freed memory, a message that meets the receive of another post or chunk, or none, and a
deadlock.

Graphs do not change, or they are a cycle of turns. Agents go on alike; but one may leave early, and
one may step where the others publish or load a state, or the reverse. Its peers must stop at that
very post, and the others as the news comes to them, agent by agent. Values go point to point: on a
graph that does not change as soon as the buffers are ready, also those of an agent that leaves; in
a cycle once all tokens of the post are here, between agents at the same mixing that both go on.
Receive slots serve other sources in other turns.

That the simulation sees races is shown by protocols with one thing left out.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import pytest
from stream_order import (
    NEVER,
    NOW,
    PARTS,
    Access,
    Channel,
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
AT_ONCE = ("values before tokens", "steps are not compared")  # as if a cycle were one graph
Edges = set[tuple[int, int]]  # (source, reader)


class Header(NamedTuple):
    step: int
    round: int
    leaving: bool = False


class World:
    """Agents whose edges in each turn are ``turns``.

    Args:
        routes: the kind of every edge of any turn.
        but: what is left out of the protocol.
    """

    def __init__(
        self, n: int, turns: list[Edges], routes: dict[tuple[int, int], str], but: str, rng: Any
    ) -> None:
        self.n, self.turns, self.routes, self.but, self.rng = n, turns, routes, but, rng
        self.tau = rng.choice((1, 2))  # mixing rounds in a step
        self.plans = plans(n, self.tau, rng)
        self.streams: list[Stream] = []
        self.wires: dict[Stream, None] = {}
        self.channels: defaultdict[tuple[int, int], Channel] = defaultdict(
            lambda: Channel(lambda wire: self.wires.update({wire: None}), self.toss)
        )
        self.met: Counter[str] = Counter()
        self.agents = [Agent(self, rank) for rank in range(n)]

    def play(self) -> None:
        hosts = [Host(agent.life()) for agent in self.agents]
        speed: defaultdict[Any, float] = defaultdict(lambda: 10 ** self.rng.uniform(-2, 2))
        while True:
            self.wires = {wire: None for wire in self.wires if wire.queue}
            busy = [stream for stream in (*self.streams, *self.wires) if stream.queue]
            while any(stream.settle() for stream in busy):
                pass
            actors: list[Host | Stream] = [*hosts, *busy]
            ready = [actor for actor in actors if actor.ready()]
            if not ready:
                break
            if self.rng.random() < 0.05:
                speed.pop(self.rng.choice(ready), None)
            self.rng.choices(ready, [speed[actor] for actor in ready])[0].go()
        if not all(host.over for host in hosts):
            raise Race("deadlock")
        if any(channel.sends for channel in self.channels.values()):
            raise Race("nobody receives a message")
        if not self.but:
            assert [agent.x.version for agent in self.agents] == self.last()

    def last(self) -> list[tuple[int, int, int]]:
        """What each agent's parameters are in the end, whatever the order of events."""
        ends = [len(plan) - 1 for plan in self.plans]
        for n in range(max(ends)):
            for rank, agent in enumerate(self.agents):
                if n <= ends[rank] and any(
                    n > ends[peer] or self.plans[peer][n] != self.plans[rank][n]
                    for peer in agent.peers
                ):
                    ends[rank] = n
        return [agent.version(end) for agent, end in zip(self.agents, ends, strict=True)]

    def toss(self) -> bool:
        return bool(self.rng.random() < 0.5)

    def meet(self, name: str) -> Check:
        """A barrier."""
        self.met[name] += 1
        return lambda: self.met[name] == self.n


def plans(n: int, tau: int, rng: Any) -> list[list[int]]:
    """For each agent the mixings, step * tau + round, that its posts are for.

    In most calls agents go on by one mixing; between steps they may publish again what they have,
    or load the state of step 0. One may do so alone, or not with the others, and one may leave two
    calls before them.
    """
    calls = range(5)
    loads = {call: rng.choice((True, False)) for call in calls}
    common = {call for call in calls if rng.random() < 0.2}
    odd, leaver = rng.randrange(4 * n), rng.randrange(4 * n)  # if they are somebody
    made = []
    for rank in range(n):
        publishes = common ^ ({rng.choice(calls)} if rank == odd else set())
        plan = [0]
        for call in calls[: -2 if rank == leaver else None]:
            now = plan[-1]
            if call in publishes and now % tau == 0:
                plan.append(0 if loads[call] else now)
            else:
                plan.append(now + 1)
        made.append(plan)
    return made


class Agent:
    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank, self.plan = world, rank, world.plans[rank]
        self.sources = {s: kind for (s, r), kind in world.routes.items() if r == rank}
        self.readers = {r: kind for (s, r), kind in world.routes.items() if s == rank}
        self.peers = {**self.sources, **self.readers}
        if world.but == "tokens only along edges":
            self.peers = self.sources
        self.x, self.sent, self.published = Memory(), parts(), [parts(), parts()]
        if world.but == "one buffer":
            self.published = 2 * self.published[:1]
        # Fetched copies are by source; receive slots by number, as a turn's sources fill them.
        self.near: defaultdict[Any, list[Memory]] = defaultdict(parts)
        self.received: defaultdict[int, list[Memory]] = defaultdict(parts)
        self.events: list[Record | None] = [None, None]
        self.fetched: Record | None = None  # recorded last on `fetch`, and `here` on `up`
        self.here: Record | None = None
        self.mains = [Stream(), Stream()]  # the user's stream may change from step to step
        self.stream = self.mains[0]
        self.fetch, self.down, self.up = Stream(), Stream(), Stream()
        world.streams += [*self.mains, self.fetch, self.down, self.up]
        self.posts = self.tokens = 0  # a token is the message that brings a header
        self.headers: list[Header] = []
        self.turn: tuple[dict[int, str], dict[int, str]] = {}, {}  # of `sources` and `readers`
        self.told = False  # whether all peers' tokens of this post are here
        self.errands: list[Host] = []

    def life(self) -> Until:
        self.give_pass([])
        yield from self.post()
        for n in range(len(self.plan) - 1):
            for _ in range(self.world.rng.randrange(3)):  # gradient hooks
                yield NOW
                self.advance()
            yield from self.complete(NEVER)
            if self.must_stop(n):
                break
            self.stream = self.world.rng.choice(self.mains)
            neighbours, publishes = self.take(n), self.plan[n + 1] <= self.plan[n]
            self.give_pass([] if publishes else neighbours)
            yield self.stream.record().is_done if publishes else NOW  # publish() waits for it
            yield from self.post()
        yield from self.close()

    def must_stop(self, n: int) -> bool:
        """AgentLeft, or OutOfStep."""
        headers = [self.world.agents[peer].headers[n] for peer in self.awaited()]
        if self.world.but == "steps are not compared":
            return any(header.leaving for header in headers)
        return any(header != self.header(n) for header in headers)

    def header(self, n: int) -> Header:
        return Header(*divmod(self.plan[n], self.world.tau))

    def version(self, n: int) -> tuple[int, int, int]:
        return self.rank, n, self.plan[n]

    def give_pass(self, neighbours: list[tuple[Memory, Any]]) -> None:
        n = self.posts
        before = (self.x, self.version(n - 1) if n else None)
        own = [(memory, self.version(n)) for memory in (self.x, *self.published[n % 2])]
        self.stream.queue.append(Access([before, *neighbours], own))

    def unless(self, but: str, stream: Stream, *records: Record | None) -> None:
        for record in records if self.world.but != but else ():
            stream.wait(record)

    def awaited(self) -> dict[int, str]:
        """Whose tokens must be here before a pass."""
        only_turn = self.world.but == "tokens only along the turn's edges"
        return self.turn[0] if only_turn else self.peers

    def post(self, leaving: bool = False) -> Until:
        n, early = self.posts, self.world.but == "token before record"
        self.posts += 1
        self.headers += [Header(self.headers[-1].step, 0, True) if leaving else self.header(n)]
        if not leaving:
            edges = self.world.turns[self.plan[n] % len(self.world.turns)]
            self.turn = (
                {s: kind for s, kind in self.sources.items() if (s, self.rank) in edges},
                {r: kind for r, kind in self.readers.items() if (self.rank, r) in edges},
            )
        self.told = False
        self.tokens += early
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
                if of("staged", self.turn[1]):
                    self.down.queue.append(copy([part], [to]))
                on_host.append(self.down.record())
            self.errands.append(Host(self.send(n, on_host, requests)))
            self.errands.append(Host(self.receive(n, requests)))
        if "device" in self.world.routes.values():
            self.errands.append(Host(self.send_device(n, own)))
        self.tokens += not early

    def listen(self, n: int) -> Until:
        agents = self.world.agents
        yield lambda: all(agents[peer].tokens > n for peer in self.awaited())
        self.told = True
        for source in of("fetched", self.turn[0]):
            its = agents[source].events[n % 2]
            self.unless("copies do not wait for the source", self.fetch, its)
            self.fetch.queue.append(copy(agents[source].published[n % 2], self.near[source]))
            self.fetched = self.fetch.record()

    def send(self, n: int, on_host: list[Record], requests: list[Check]) -> Until:
        early: list[list[Check]] = []
        if self.world.but == "receives do not wait":
            yield self.may_start
            early = [self.receives(n, "staged", i) for i in PARTS]
        for i, record in enumerate(on_host):
            if any(of("staged", peers) for peers in self.turn):
                yield self.when(record, but="chunks do not wait")
            sends = self.sends(n, "staged", i, [self.sent[i]])
            if self.world.but == "sends are not waited for":
                sends = []
            requests.append(every(sends + (early[i] if early else self.receives(n, "staged", i))))

    def receive(self, n: int, requests: list[Check]) -> Until:
        for i in PARTS:
            yield lambda i=i: len(requests) > i and requests[i]()  # type: ignore[misc]
            for slot in range(len(of("staged", self.turn[0]))):
                to = self.near["staged", slot][i]
                self.up.queue.append(copy([self.received[slot][i]], [to]))
        self.here = self.up.record()

    def send_device(self, n: int, own: Record) -> Until:
        yield self.when(own, but="MPI does not wait")
        sends = self.sends(n, "device", 0, self.published[n % 2])
        yield every(sends + self.receives(n, "device", 0))

    def when(self, record: Record, but: str) -> Check:
        """Whether values may go, and what was recorded is done."""
        if self.world.but == but:
            return self.may_start
        return lambda: self.may_start() and record.done

    def may_start(self) -> bool:
        return self.told or len(self.world.turns) == 1 or self.world.but in AT_ONCE

    def together(self, n: int, peer: int) -> bool:
        """Whether values go between this agent and ``peer``: both must find the same."""
        mine, but = self.headers[n], self.world.but
        if len(self.world.turns) == 1:
            return not mine.leaving or but != "no values with who leaves"
        if but in (*AT_ONCE, "values without regard to headers"):
            return True
        its = self.world.agents[peer].headers[n]
        if but == "rounds are not compared":
            mine, its = mine._replace(round=0), its._replace(round=0)
        return mine == its and (not mine.leaving or but == "values with who leaves")

    def sends(self, n: int, kind: str, i: int, memory: list[Memory]) -> list[Check]:
        readers = [reader for reader in of(kind, self.turn[1]) if self.together(n, reader)]
        return [self.world.channels[self.rank, r].send((n, i), memory) for r in readers]

    def receives(self, n: int, kind: str, i: int) -> list[Check]:
        requests = []
        for slot, source in enumerate(of(kind, self.turn[0])):
            to = [self.received[slot][i]] if kind == "staged" else self.near[kind, slot]
            if self.together(n, source):
                requests.append(self.world.channels[source, self.rank].receive((n, i), to))
        return requests

    def take(self, n: int) -> list[tuple[Memory, Any]]:
        """Make the stream wait; the memory that the pass reads, and what it must find there."""
        agents, near = self.world.agents, ("direct", "fetched")
        self.unless("no wait for the last stream", self.stream, self.events[n % 2])
        for peers, name in ((self.sources, "sources"), (self.readers, "readers")):
            its = [agents[p].events[n % 2] for p in self.awaited() if peers.get(p) in near]
            self.unless(f"no wait for {name}", self.stream, *its)
        self.unless("no wait for copies", self.stream, self.fetched, self.here)
        slots: Counter[str] = Counter()
        reads = []
        for source, kind in self.turn[0].items():
            place = source if kind in near else (kind, slots[kind])
            slots[kind] += 1
            there = agents[source].published[n % 2] if kind == "direct" else self.near[place]
            reads += [(memory, (source, n, self.plan[n])) for memory in there]
        return reads

    def advance(self) -> None:
        for errand in self.errands:
            if errand.ready():
                errand.go()

    def complete(self, enough: Check) -> Until:
        while not (enough() or all(errand.over for errand in self.errands)):
            yield lambda: enough() or any(errand.ready() for errand in self.errands)
            self.advance()

    def close(self) -> Until:
        """As `exchange.Exchange.drain`, with no grace before saying that this agent left."""
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
        buffers = (*self.published, *self.near.values(), *self.received.values(), self.sent)
        for memory in sum(buffers, [self.x]):
            if memory.readers or memory.written:
                raise Race("freed in use")
            memory.freed = True


def of(kind: str, peers: dict[int, str]) -> list[int]:
    return [peer for peer, its in peers.items() if its == kind]


def every(checks: list[Check]) -> Check:
    return lambda: all(check() for check in checks)


def play(shape: str, n: int, kind: str, seed: int, but: str = "") -> None:
    rng = random.Random(f"{shape} {n} {kind} {seed}")
    everyone = range(n)
    ring = {(i, (i + 1) % n) for i in everyone}
    directed = ring | {(s, r) for s in everyone for r in everyone if rng.random() < 0.3}
    subsets: list[Edges] = [{e for e in sorted(directed) if rng.random() < 0.4} for _ in range(3)]
    turns = {
        "directed ring": [ring],
        "directed": [directed],
        "ring": [ring | {(r, s) for s, r in ring}],
        "chain": [{(s, r) for s in everyone for r in everyone if abs(s - r) == 1}],
        "star": [{(s, r) for s in everyone for r in everyone if s * r == 0}],
        "complete": [{(s, r) for s in everyone for r in everyone}],
        "one peer": [
            {(i, (i + hop) % n) for i in everyone} for hop in (1, 2, 4) if hop < max(n, 2)
        ],
        "matchings": [
            {(s, r) for s in everyone for r in everyone if s - r in (-1, 1) and min(s, r) % 2 == i}
            for i in (0, 1)
        ],
        "subsets": [*subsets, directed - set().union(*subsets)],
    }[shape]
    for edges in turns:
        edges -= {(i, i) for i in everyone}
    routes = {
        e: rng.choice(KINDS) if kind == "mixed" else kind for e in sorted(set().union(*turns))
    }
    World(n, turns, routes, but, rng).play()


SHAPES = ("directed ring", "directed", "ring", "chain", "star", "complete")
CYCLES = ("one peer", "matchings", "subsets")


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
@pytest.mark.parametrize("shape", [*SHAPES, *CYCLES])
def test_every_pass_reads_what_it_must_and_all_come_to_an_end(shape: str, kind: str) -> None:
    for n in range(1, 6):
        for seed in range(3):
            play(shape, n, kind, seed)


@pytest.mark.parametrize(
    ("but", "shape", "kind"),
    [
        ("tokens only along edges", "directed ring", "direct"),
        ("tokens only along edges", "subsets", "direct"),
        ("tokens only along the turn's edges", "subsets", "direct"),
        ("tokens only along the turn's edges", "one peer", "fetched"),
        ("token before record", "ring", "direct"),
        ("no wait for sources", "directed ring", "direct"),
        ("no wait for readers", "directed ring", "direct"),
        ("no wait for readers", "directed", "fetched"),
        ("no wait for readers", "subsets", "direct"),
        ("no wait for the last stream", "ring", "direct"),
        ("one buffer", "ring", "direct"),
        ("no wait for copies", "ring", "fetched"),
        ("no wait for copies", "ring", "staged"),
        ("copies do not wait for the pass", "ring", "fetched"),
        ("copies do not wait for the source", "ring", "fetched"),
        ("way down does not wait", "ring", "staged"),
        ("way down does not wait for the way up", "chain", "staged"),
        ("chunks do not wait", "ring", "staged"),
        ("receives do not wait", "ring", "staged"),
        ("receives do not wait", "one peer", "staged"),
        ("sends are not waited for", "subsets", "staged"),
        ("MPI does not wait", "ring", "device"),
        ("MPI does not wait", "one peer", "device"),
        ("no values with who leaves", "ring", "staged"),
        ("values with who leaves", "matchings", "device"),
        ("values before tokens", "one peer", "staged"),
        ("values before tokens", "subsets", "device"),
        ("values without regard to headers", "matchings", "staged"),
        ("values without regard to headers", "subsets", "device"),
        ("rounds are not compared", "one peer", "device"),
        ("steps are not compared", "ring", "direct"),
        ("steps are not compared", "subsets", "staged"),
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
# is over, which is after the pass. In a cycle, where nothing comes to those who leave, it is also
# after a pass that waited for the last way up.
@pytest.mark.parametrize(
    ("but", "shapes"),
    [
        ("one event", (*SHAPES, *CYCLES)),
        ("way up does not wait", (*SHAPES, *CYCLES)),
        ("way down does not wait for the way up", CYCLES),
    ],
)
def test_no_race_with(but: str, shapes: tuple[str, ...]) -> None:
    for shape in shapes:
        for kind in (*KINDS, "mixed"):
            for seed in range(3):
                play(shape, 3, kind, seed, but)

"""One job of `scaling`: what its ranks measure and count, by graph and transport."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import contenders
import numpy as np
import scaling_model as theory
import torch
from contenders import Contender
from torch.nn import functional

import mpicdsgd
from mpicdsgd.models import build

MODES = ("weak", "strong")
MOST_COMPLETE = 16  # agents
CLASSES = 10
LR, MU = 1e-4, 0.9
COLUMNS = ("wait_s", "bytes", "messages", "message_bytes", "bytes_formula", "messages_formula",
           "message_bytes_formula", "off")  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "no momentum": {"momentum": False},
    "look-ahead": {"look_ahead": True},
    "2 rounds": {"rounds": 2},
    "bfloat16": {"wire": "bfloat16"},
}


# A job: what its ranks count


class CountedComm:
    """A communicator that counts the messages given to it, and their bytes."""

    def __init__(self, comm: Any, counts: np.ndarray) -> None:
        self._comm, self._counts = comm, counts

    def Isend(self, send: Any, to: int) -> Any:  # noqa: N802 (MPI's own name)
        _, (blocks, _), block = send
        self._counts += [1, blocks * block.Get_size()]
        return self._comm.Isend(send, to)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)


def count_messages() -> np.ndarray:
    """Messages and bytes that exchanges made from now on give to MPI, as they grow. Local."""
    from mpicdsgd.comm.exchange.messages import Messages

    counts = np.zeros(2)
    make: Any = Messages.__init__

    def counted(self: Any, *args: Any, **more: Any) -> None:
        make(self, *args, **more)
        self._comm = CountedComm(self._comm, counts)

    Messages.__init__ = counted  # type: ignore[method-assign]
    return counts


def resident_bytes() -> int | None:
    """Private memory of this process and its share of what it shares, without files. Local."""
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc keeps what was freed
        library.malloc_trim(0)
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    parts = [kib.get(name) for name in ("Pss_Anon", "Pss_Shmem")]
    return None if None in parts else 1024 * sum(p for p in parts if p is not None)


# A job: graphs


def mixings(names: Sequence[str], n: int, skipped: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """The graphs by name, each once, with their matrices; why others are left out."""
    seen: dict[Any, str] = {}
    for name in names:
        where = f"{name}, N={n}"
        try:
            mixing = _mixing(name, n)
        except mpicdsgd.UserError as error:
            skipped[where] = str(error)
            continue
        key = (mixing.graph.sources, len(mixing.turns))
        if key in seen:
            skipped[where] = f"the same as {seen[key]}"
            continue
        seen[key] = name
        yield name, mixing


def _mixing(name: str, n: int) -> Any:
    if name == "one-peer exponential":
        make = getattr(mpicdsgd, "one_peer_exponential", None)
        if make is None:
            raise mpicdsgd.UserError("this mpicdsgd has no one_peer_exponential")
        return make(n)
    if name == "complete" and n > MOST_COMPLETE:
        raise mpicdsgd.UserError(f"more than {MOST_COMPLETE} agents")
    if name == "torus" and n < 4:
        raise mpicdsgd.UserError("fewer than 4 agents")
    make = {"ring": mpicdsgd.ring, "torus": mpicdsgd.torus, "complete": mpicdsgd.complete,
            "exponential": mpicdsgd.exponential}[name]  # fmt: skip
    return mpicdsgd.uniform(make(n))


def places_of(agents: Any, exchange: Any) -> list[theory.Place]:
    """This agent's place in each turn, by the ways that its exchange says values go. Collective."""
    near = {edge.source for edge in exchange.edges if edge.transport == "direct"}
    everybody = agents.comm.allgather(near)
    shared = any(everybody)
    return [
        theory.Place(
            readers=len(turn.destinations),
            sources=len(turn.sources),
            peers=len({*agents.sources, *agents.destinations}),
            far_readers=sum(agents.rank not in everybody[r] for r in turn.destinations),
            far_sources=sum(source not in near for source in turn.sources),
            tokens=shared or len(agents.turns) > 1,
            shared=shared,
        )
        for turn in agents.turns
    ]


# A job: steps


class Case:
    """One way to train, and what its steps waited and sent. Collective.

    Args:
        agents: None: alone.
        counts: of messages and their bytes, see `count_messages`.

    Attributes:
        waits: seconds waited in every step, by mode.
        sent: per step of every block of them, bytes as the exchange says, messages, their bytes;
            then the same by the formula.
        formula: what each turn sends.
    """

    def __init__(
        self, make: Callable[[], Any], agents: Any, transport: str, wire: str, counts: np.ndarray
    ) -> None:
        torch.manual_seed(0)
        self._model, self._counts = make(), counts
        parameters = self._model.parameters()
        if agents is None:
            self.optimizer: Any = torch.optim.SGD(parameters, lr=LR, momentum=MU, nesterov=True)
        else:
            config = mpicdsgd.ExchangeConfig(transport=transport, wire=wire, timeout_s=120.0)
            self.optimizer = mpicdsgd.CDMSGD(
                parameters, lr=LR, momentum=MU, agents=agents, exchange=config
            )
        self.exchange = getattr(self.optimizer, "exchange", None)
        if self.exchange:
            contenders.at_rest(self.optimizer)
        self.waits: dict[str, list[float]] = {mode: [] for mode in MODES}
        self.sent: list[np.ndarray] = []
        self.formula = np.zeros((1, 3))
        self._begun: np.ndarray | None = None
        self._steps, self._by_formula = 0, np.zeros(3)

    def contender(self, mode: str, batch: Any) -> Contender:
        inputs, targets = batch
        waits = self.waits[mode]

        def step() -> None:
            if self._begun is None:
                self._begun, self._steps = self._totals(), 0
            waited_s = self.exchange.wait_s if self.exchange else 0.0
            self.optimizer.zero_grad()
            functional.cross_entropy(self._model(inputs), targets).backward()
            self.optimizer.step()
            self._steps += 1
            turn = self.optimizer.steps % len(self.formula) if self.exchange else 0
            self._by_formula += self.formula[turn]
            waits.append(self.exchange.wait_s - waited_s if self.exchange else 0.0)

        def rest() -> None:
            if self.exchange:
                contenders.at_rest(self.optimizer)
            # Not before: what a step posts may be sent while the next one waits.
            self.sent.append((self._totals() - self._begun) / self._steps)
            self._begun = None

        return Contender(step, rest)

    def waited_s(self, mode: str, steps: int) -> float:
        """Of a step, the mean, without what `contenders` does not time either."""
        return float(np.reshape(self.waits[mode], (-1, steps + 1))[1:, 1:].mean())

    def _totals(self) -> np.ndarray:
        size_bytes = self.exchange.bytes_sent if self.exchange else 0
        return np.array([size_bytes, *self._counts, *self._by_formula])


def measure_steps(args: argparse.Namespace, comm: Any, say: Any) -> None:
    """All graphs and transports on this job's ranks, taking turns. Collective."""
    n = comm.size
    config = build.ModelConfig(args.model)
    batches = {"weak": args.batch, "strong": args.total // n + (comm.rank < args.total % n)}

    def make() -> Any:
        return build.build(config, tuple(args.input), CLASSES)

    torch.manual_seed(1 + comm.rank)
    data = {mode: (torch.randn(size, *args.input), torch.randint(CLASSES, (size,)))
            for mode, size in batches.items()}  # fmt: skip
    counts = count_messages()
    local = f"local, N={n}"
    cases = {local: Case(make, None, "", args.wire, counts)}
    lengths = [p.numel() for p in make().parameters()]
    size = theory.elements(lengths)
    skipped: dict[str, str] = {}
    for graph, mixing in mixings(args.graphs, n, skipped):
        agents = mpicdsgd.Agents(comm, mixing, device="cpu")
        for transport in args.transports:
            name = f"{graph}, N={n}: {transport}"
            try:
                cases[name] = case = Case(make, agents, transport, args.wire, counts)
            except mpicdsgd.UserError as error:  # on all ranks alike
                skipped[name] = str(error)
                continue
            sent = [theory.sent(p, size, args.wire) for p in places_of(agents, case.exchange)]
            case.formula = np.array([[*vars(one).values()] for one in sent], float)
    turns = {f"{name}, {mode}": case.contender(mode, data[mode])
             for name, case in cases.items() for mode in MODES}  # fmt: skip
    times = contenders.take_turns(comm, turns, args.rounds, args.steps).wall
    for name, case in cases.items():
        sent_6 = np.array(case.sent)
        off = np.abs(sent_6[:, :3] - sent_6[:, 3:]).max()
        for mode in MODES:
            waited_s = case.waited_s(mode, args.steps)
            rows = contenders.gather(comm, [waited_s, *sent_6[-1], off])
            wall = times[f"{name}, {mode}"]
            q1, _, q3 = statistics.quantiles(wall, n=4, method="inclusive")
            row = common.spread(wall) | {"q1_s": q1, "q3_s": q3}
            row["over_local"] = common.ratio(wall, times[f"{local}, {mode}"])
            row |= zip(COLUMNS, rows.mean(axis=0).tolist(), strict=True)
            row["off"] = float(rows[:, -1].max())
            say(step=name, mode=mode, agents=n, batch=batches[mode], row=row)
        if case.exchange:
            case.optimizer.close()
    say(skipped=skipped, parameters=sum(lengths), elements=size)


# A job: memory


def measure_memory(args: argparse.Namespace, comm: Any, say: Any) -> None:
    """What parameters, gradients and optimizer take on a rank, the mean. Collective."""
    n = comm.size
    if resident_bytes() is None:
        say(skipped={f"memory, N={n}": "no Pss_Anon and Pss_Shmem in /proc/self/smaps_rollup"})
        return
    varied = n == min((k for k in args.agents if k > 1), default=1)
    known: set[str] = set()
    for graph, mixing in mixings(args.graphs, n, {}):
        agents = mpicdsgd.Agents(comm, mixing, device="cpu")
        variants: dict[str, Any] = {"": {}} | (VARIANTS if varied and graph == "ring" else {})
        for transport in args.transports:
            name = f"{graph}, N={n}: {transport}"
            try:
                if transport not in known:  # the first also grows what MPI keeps for all
                    memory_of(agents, transport, args.memory_size, wire=args.wire)
                    known.add(transport)
                    gc.collect()
                    gc.freeze()  # what is imported by now need not be looked at ever again
                for variant, options in variants.items():
                    options = {"wire": args.wire} | options
                    found = memory_of(agents, transport, args.memory_size, **options)
                    say(memory=f"{name}{variant and ', '}{variant}", row=found)
            except mpicdsgd.UserError as error:  # on all ranks alike
                say(skipped={f"memory, {name}": str(error)})


def memory_of(
    agents: Any,
    transport: str,
    size: int,
    *,
    wire: str,
    momentum: bool = True,
    look_ahead: bool = False,
    rounds: int = 1,
) -> common.Record:
    """Bytes measured and by the formula, of ``size`` parameters. Collective."""

    def resident() -> int:
        contenders.wait(agents.comm.Ibarrier())
        found = resident_bytes()
        contenders.wait(agents.comm.Ibarrier())
        assert found is not None
        return found

    before = resident()
    parameters = common.parameters(size, agents.device, agents.rank)
    config = mpicdsgd.ExchangeConfig(transport=transport, wire=wire, timeout_s=120.0)
    form: Any = {"nesterov": "look-ahead"} if look_ahead else {}
    make: Any = mpicdsgd.CDMSGD if momentum else mpicdsgd.CDSGD
    optimizer = make(parameters, lr=LR, agents=agents, rounds=rounds, exchange=config, **form)
    gradients = [p.grad for p in parameters if p.grad is not None]
    for _ in range(3):
        torch.autograd.graph.increment_version(gradients)  # else they count as old ones
        optimizer.step()
    contenders.at_rest(optimizer)
    measured = resident() - before
    place = max(places_of(agents, optimizer.exchange), key=lambda p: (p.far_sources, p.sources))
    parts = theory.memory(place, [p.numel() for p in parameters], wire, momentum=momentum,
                          look_ahead=look_ahead, rounds=rounds)  # fmt: skip
    optimizer.close()
    rows = contenders.gather(agents.comm, [float(b) for b in (measured, *parts.values())])
    rows = rows.mean(axis=0).tolist()
    means = dict(zip(parts, rows[1:], strict=True))
    return {"measured": rows[0], "formula": sum(means.values()), "parts": means}


# A job: the exchange alone


def measure_exchange(args: argparse.Namespace, comm: Any, say: Any) -> None:
    """Post, wait and, where neighbours are read in place, read them: on the ring. Collective."""
    if comm.size == 1:
        return
    agents = mpicdsgd.Agents(comm, mpicdsgd.uniform(mpicdsgd.ring(comm.size)), device="cpu")
    cores = tuple(sorted(os.sched_getaffinity(0)))
    everybody = comm.allgather((agents.node, cores))
    alone = all(everybody.count(one) <= len(one[1]) for one in everybody)
    for transport in args.transports:
        for size in args.sizes:
            try:
                seconds, place = exchange_s(agents, transport, size, args.rounds)
            except mpicdsgd.UserError:
                break  # said by `measure_steps`
            # In place a reader moves what elsewhere the sender does: on a ring that is as much.
            one = theory.sent(place, size, "float32")
            row = {"agents": comm.size, "alone": alone, "size": size, "messages": one.messages}
            say(exchange=transport, row=row | {"bytes": one.size_bytes} | common.spread(seconds))


def exchange_s(
    agents: Any, transport: str, size: int, rounds: int
) -> tuple[list[float], theory.Place]:
    """Seconds of one exchange on the slowest rank, in every round. Collective."""
    from mpicdsgd.comm.exchange.opening import open_exchange

    config = mpicdsgd.ExchangeConfig(transport=transport, timeout_s=120.0)
    exchange = open_exchange(agents, size, config)
    (place,) = places_of(agents, exchange)
    copy = np.zeros(size, np.float32)
    posts = max(3, min(100, 2_000_000 // size))
    seconds = []
    for round_ in range(rounds + 1):
        contenders.wait(agents.comm.Ibarrier())
        start = time.perf_counter()
        for step in range(round_ * posts, (round_ + 1) * posts):
            exchange.post(step)
            near = exchange.wait(step)
            for values in near if place.shared else ():
                np.copyto(copy, values)
        own = (time.perf_counter() - start) / posts
        seconds.append(float(contenders.gather(agents.comm, [own]).max()))
    exchange.close()
    return seconds[1:], place


def job(args: argparse.Namespace) -> int:
    """All that is measured on this job's ranks; rank 0 prints it, a JSON object a line."""
    from mpi4py import MPI

    comm: Any = MPI.COMM_WORLD
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logging.getLogger("mpicdsgd").setLevel(logging.ERROR)  # a remark for each matrix

    def say(**line: Any) -> None:
        if comm.rank == 0:
            print(json.dumps(line), flush=True)

    try:
        say(provenance=contenders.provenance() | {"threads": torch.get_num_threads()})
        measure_memory(args, comm, say)
        measure_exchange(args, comm, say)
        measure_steps(args, comm, say)
    except mpicdsgd.UserError as error:  # on all ranks alike
        if comm.rank == 0:
            print(error, file=sys.stderr)
        return 2
    return 0

"""How fast are exchange and update, beside what one would otherwise write, and beside memory?

A step of CDMSGD (Nesterov), float32, with gradients that are there already, on 2 and 4 ranks: ours
through shared memory (*direct*) and by messages (*neighbor*); the same step as a script writes it
with MPI or gloo and NumPy or torch; and what other training would do, an allreduce of the gradient
and torch.optim.SGD's step. All in one process a rank, in turn, in every round; a time is the
slowest rank's. The yardstick is STREAM's triad, which all ranks run at once in the same rounds: the
faster of ordinary and streaming stores. A step's bytes are those that no implementation can avoid:
(degree + 6) * 4 per parameter.

    python bench/exchange.py [--ranks 2,4] [--size D] [--quick] [--out FILE]
    mpiexec -n 4 python bench/exchange.py ...
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import common
import contenders
import numpy as np
import torch
import torch.distributed as dist
from common import ALPHA, MU
from contenders import Contender
from kernel import aligned, compile_triad

import mpicdsgd

TOPOLOGIES = ("ring", "complete", "one-peer")
VERIFIED = 3  # steps
TRIADS = ("triad", "triad, streaming")
# So long, and so many passes in a step, that no cache holds it and all ranks do run at once.
TRIAD_SIZE, TRIAD_PASSES = 8_000_000, 4
BYTES = "a step's bytes at the triad's bandwidth"
PLAIN = "Ineighbor_alltoallv + NumPy"
ALLREDUCE = "gloo all_reduce + torch SGD"
JUDGED = ("ring", 4)
GOALS = {PLAIN: 4.0, ALLREDUCE: 2.5}  # over direct
OF_TRIAD = 1.3  # of the time that the bytes take

Floats = np.ndarray


def model_of(agents: Any, size: int) -> list[torch.nn.Parameter]:
    """The same for every contender."""
    return common.parameters(size, agents.device, agents.rank)


def flat(tensors: Sequence[torch.Tensor]) -> Floats:
    """A copy, on a 64-byte boundary."""
    out = aligned(sum(t.numel() for t in tensors))
    torch.cat([t.detach() for t in tensors], out=torch.from_numpy(out))
    return out


class Ours:
    """CDMSGD on parameters of its own. Collective."""

    def __init__(self, agents: Any, way: str, size: int, gradients: list[torch.Tensor]) -> None:
        self.model = model_of(agents, size)
        for parameter, gradient in zip(self.model, gradients, strict=True):
            parameter.grad = gradient
        config = mpicdsgd.ExchangeConfig(transport=way, timeout_s=120.0)
        self._gradients = gradients
        self.optimizer = mpicdsgd.CDMSGD(
            self.model, lr=ALPHA, momentum=MU, agents=agents, exchange=config
        )

    def step(self) -> None:
        torch.autograd.graph.increment_version(self._gradients)  # else they count as old ones
        self.optimizer.step()

    def rest(self) -> None:
        contenders.at_rest(self.optimizer)

    def close(self) -> None:
        self.optimizer.close()

    def x(self) -> Floats:
        return flat(self.model)


class Script:
    """The same step, as one writes it: fetch the neighbours' parameters, then an expression.

    Args:
        g: gradient, shape (D,), unchanged.
        near: room for the neighbours' parameters, shape (degree, D), of all scripts.
        fetch: of own parameters and ``near``, in a turn of the cycle of mixing matrices.
    """

    def __init__(
        self,
        agents: Any,
        size: int,
        g: Floats,
        near: Floats,
        fetch: Callable[[Floats, Floats, int], None],
        update: Callable[..., None],
    ) -> None:
        self._x, self._v, self._g, self._near = flat(model_of(agents, size)), aligned(size), g, near
        self._v[:] = 0
        self._weights = [[np.float32(w) for w in turn.weights] for turn in agents.turns]
        self._steps = 0
        self._fetch, self._update = fetch, update

    def step(self) -> None:
        turn = self._steps % len(self._weights)
        self._fetch(self._x, self._near, turn)
        self._update(self._x, self._v, self._g, self._near, self._weights[turn])
        self._steps += 1

    def x(self) -> Floats:
        return self._x


def numpy_update(x: Floats, v: Floats, g: Floats, near: Floats, weights: list[Any]) -> None:
    alpha, mu = np.float32(ALPHA), np.float32(MU)
    step = alpha * g
    v[:] = mu * v - step
    x[:] = x + sum(w * (p - x) for w, p in zip(weights, near, strict=True)) + mu * v - step


def torch_update(x: Floats, v: Floats, g: Floats, near: Floats, weights: list[Any]) -> None:
    x_D, v_D, g_D, *near_D = (torch.from_numpy(a) for a in (x, v, g, *near))
    v_D.mul_(MU).add_(g_D, alpha=-ALPHA)
    x_D.mul_(1 - float(sum(weights)))
    for w, p_D in zip(weights, near_D, strict=True):
        x_D.add_(p_D, alpha=float(w))
    x_D.add_(v_D, alpha=MU).add_(g_D, alpha=-ALPHA)


def fetches(agents: Any) -> dict[str, Callable[[Floats, Floats, int], None]]:
    """Ways to get the neighbours' parameters. Collective."""
    from mpi4py import MPI

    comm, turns = agents.comm, agents.turns
    graphs = [
        comm.Create_dist_graph_adjacent(list(t.sources), list(t.destinations), reorder=False)
        for t in turns
    ]

    def alltoallv(x: Floats, near: Floats, turn: int) -> None:
        readers = len(turns[turn].destinations)
        send = [x, ([x.size] * readers, [0] * readers), MPI.FLOAT]
        places = [i * x.size for i in range(len(near))]
        receive = [near, ([x.size] * len(near), places), MPI.FLOAT]
        contenders.wait(graphs[turn].Ineighbor_alltoallv(send, receive))

    def isend(x: Floats, near: Floats, turn: int) -> None:
        t = turns[turn]
        requests = [comm.Irecv(p, source) for source, p in zip(t.sources, near, strict=True)]
        contenders.wait_all(requests + [comm.Isend(x, reader) for reader in t.destinations])

    def gloo(x: Floats, near: Floats, turn: int) -> None:
        mine, t = torch.from_numpy(x), turns[turn]
        operations = [dist.P2POp(dist.isend, mine, reader) for reader in t.destinations]
        for source, p in zip(t.sources, near, strict=True):
            operations.append(dist.P2POp(dist.irecv, torch.from_numpy(p), source))
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return {"alltoallv": alltoallv, "isend": isend, "gloo": gloo}


def allreduce_sgd(agents: Any, size: int, allreduce: Callable[[Floats], None]) -> Contender:
    """Average the gradient, as views of one buffer, then torch's own step on the parameters."""
    model = model_of(agents, size)
    g = flat([p.grad for p in model])
    parts = torch.from_numpy(g).split([p.numel() for p in model])
    for parameter, part in zip(model, parts, strict=True):
        parameter.grad = part
    sgd = torch.optim.SGD(model, lr=ALPHA, momentum=MU, nesterov=True)

    def step() -> None:
        allreduce(g)
        torch.from_numpy(g).div_(agents.size)
        sgd.step()

    return Contender(step)


def triads(size: int) -> dict[str, Contender]:
    """Both kinds on ``size`` elements; a step is `TRIAD_PASSES` of them. Local."""
    with tempfile.TemporaryDirectory() as folder:
        library = compile_triad(folder)
    if library is None:
        raise mpicdsgd.UserError("no triad: a C++ compiler and an x86-64 CPU are needed")
    arrays = [aligned(size) for _ in range(3)]
    ends = (*(a.ctypes.data for a in arrays), 0.5, size, 1)

    def one(function: Any) -> Contender:
        def step(keep: object = arrays) -> None:
            for _ in range(TRIAD_PASSES):
                function(*ends)

        return Contender(step)

    both = (library.triad, library.triad_streaming)
    return {name: one(function) for name, function in zip(TRIADS, both, strict=True)}


def measure(
    agents: Any, size: int, rounds: int, steps: int, triad_size: int
) -> tuple[common.Seconds, float]:
    """Seconds per step of everything in every round, and how far the results are apart. Collective.

    The second is the largest difference of parameters, ours and other scripts', from the plain
    script's after `VERIFIED` steps.
    """
    from mpi4py import MPI

    gradients = [p.grad for p in model_of(agents, size)]
    g = flat(gradients)
    degree = len(agents.turns[0].sources)  # the same in all turns
    near = aligned(size * degree).reshape(-1, size)
    fetch = fetches(agents)
    alike: dict[str, Any] = {
        f"ours, {way}": Ours(agents, way, size, gradients) for way in ("direct", "neighbor")
    }
    for name, way, update in (
        (PLAIN, "alltoallv", numpy_update),
        ("Isend, Irecv + NumPy", "isend", numpy_update),
        ("gloo batch_isend_irecv + torch", "gloo", torch_update),
    ):
        alike[name] = Script(agents, size, g, near, fetch[way], update)
    for one in alike.values():
        for _ in range(VERIFIED):
            one.step()
    plain = alike[PLAIN].x()
    apart = max(float(np.abs(one.x() - plain).max()) for one in alike.values())
    apart = float(contenders.gather(agents.comm, [apart]).max())

    turns = triads(triad_size) | {
        name: Contender(one.step, *((one.rest, one.close) if isinstance(one, Ours) else ()))
        for name, one in alike.items()
    }
    turns["Allreduce + torch SGD"] = allreduce_sgd(
        agents, size, lambda a: agents.comm.Allreduce(MPI.IN_PLACE, a)
    )
    turns[ALLREDUCE] = allreduce_sgd(agents, size, lambda a: dist.all_reduce(torch.from_numpy(a)))
    times = contenders.take_turns(agents.comm, turns, rounds, steps)
    for one in turns.values():
        one.close()
    # A triad's pass moves 12 bytes an element.
    share = (degree + 6) / 3 * size / (triad_size * TRIAD_PASSES)
    both = [times.wall.pop(name) for name in TRIADS]
    seconds = {BYTES: [share * min(pair) for pair in zip(*both, strict=True)]}
    return seconds | times.wall, apart


def checks_of(
    topology: str, agents: Any, size: int, seconds: common.Seconds, apart: float
) -> list[Any]:
    where = f"{topology}, {agents.size} ranks"
    judged = (topology, agents.size) == JUDGED
    direct = seconds["ours, direct"]
    name = f"{where}: largest difference from the plain script"
    checks = [common.check(name, apart, 1e-5, at_most=True)]
    for name, times in seconds.items():
        if name not in (BYTES, "ours, direct"):
            goal = GOALS.get(name) if judged else None
            over = common.ratio(times, direct)
            checks.append(common.check(f"{where}: {name} over ours, direct", over, goal))
    goal = OF_TRIAD if judged else None
    over = common.ratio(direct, seconds[BYTES])
    judged = size >= TRIAD_SIZE  # a smaller step's fixed costs count, and a cache may hold it
    name = f"{where}: ours, direct over {BYTES}"
    checks.append(common.check(name, over, goal, at_most=True, judged=judged))
    return checks


def job(args: argparse.Namespace, size: int, rounds: int, steps: int) -> common.Record:
    """All topologies on this job's ranks. Collective."""
    from mpi4py import MPI

    contenders.open_gloo(MPI.COMM_WORLD)
    triad_size = max(size, TRIAD_SIZE)
    results: dict[str, Any] = {}
    checks: list[common.Record] = []
    seen: list[Any] = []
    for topology in args.topologies.split(","):
        agents = contenders.agents_on(topology)
        edges = [turn.graph.sources for turn in agents.mixing.turns]
        if edges in seen:
            continue  # of two agents, a ring is complete
        seen.append(edges)
        seconds, apart = measure(agents, size, rounds, steps, triad_size)
        where = f"{topology}, {agents.size} ranks"
        results |= {f"{where}: {name}": common.spread(t) for name, t in seconds.items()}
        checks += checks_of(topology, agents, size, seconds, apart)
    contenders.close_gloo(MPI.COMM_WORLD)
    return {
        "ranks": MPI.COMM_WORLD.size,
        "parameters": size,
        "rounds": rounds,
        "steps": steps,
        "triad": {"parameters": triad_size, "passes": TRIAD_PASSES},
        "skipped": {},
        "results": results,
        "checks": checks,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", type=int, default=None, help="parameters; default 25e6")
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES), help="default: %(default)s")
    contenders.add_arguments(parser, "exchange")
    args = parser.parse_args()
    size = args.size or (2_000_000 if args.quick else 25_000_000)
    rounds, steps = (3, 2) if args.quick else (11, 2)
    return contenders.run(args, lambda: job(args, size, rounds, steps))


if __name__ == "__main__":
    sys.exit(main())

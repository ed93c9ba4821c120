"""How long does a training step take where hosts are joined by a slow network, a rank on each?

A step is zero_grad(set_to_none=True), forward, backward and the optimizer's, as in ../step.py. Ours
is CDMSGD by messages on the ring (two neighbours) and on the one-peer exponential graph (in each
step one reads, one is read), with float32 and with bfloat16 on the wire. Others:
DistributedDataParallel on gloo, also with gradients sent as float16 (torch has no bfloat16 there),
and a parameter server over Isend and Irecv whose host trains, too. Local exchanges nothing. One-way
shift is no step: each rank sends the model's bytes to the next, which is what the network gives.
All in one process a rank, in turn, in every round; a parameter server, being slow, in the first
ones only. Times are the slowest rank's.

    bash bench/network/run.sh [--quick] ...                    # hosts made on one machine
    python bench/network/run.py --launcher "srun -N {n} -n {n}" --interface ib0
"""

from __future__ import annotations

import argparse
import math
import shlex
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench/, whose modules all of it shares

import common
import contenders
import numpy as np
import torch
from contenders import Contender
from step import CLASSES, IMAGE, LR, MU, Trainer, sgd
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import mpicdsgd
from mpicdsgd.models import networks

LOCAL, SHIFT, DDP, SERVER = "local", "one-way shift", "DDP", "parameter server"
RING, ONE_PEER = "ours, ring", "ours, one-peer"
WIRES = ("float32", "bfloat16")
WIDTH = 2051  # of the MLP's three hidden layers: 10M parameters
JUDGED_HOSTS = 8
# On JUDGED_HOSTS, for the MLP: whose time over whose, the goal, whether that is the most.
GOALS = (
    (DDP, f"{ONE_PEER}, float32", 1.6, False),
    (DDP, f"{ONE_PEER}, bfloat16", 3.0, False),
    (DDP, f"{RING}, bfloat16", 1.6, False),
    (f"{RING}, float32", DDP, 1.2, True),
)


# Contenders


def wait(requests: Sequence[Any]) -> None:
    """Complete MPI requests; hosts that are namespaces share cores, so nothing spins."""
    from mpi4py import MPI

    while not MPI.Request.Testall(requests):
        time.sleep(1e-4)


class Server:
    """Rank 0 adds up all gradients, makes the step and sends the parameters to all.

    Making one is collective over ``comm``, and so is `step`, which follows the backward pass.
    """

    def __init__(self, comm: Any, model: torch.nn.Module) -> None:
        self._comm = comm.Dup()
        self._parameters = list(model.parameters())
        self._optimizer = sgd(self._parameters)
        self.zero = self._optimizer.zero_grad
        size = sum(p.numel() for p in self._parameters)
        # Elsewhere: the parameters, where they come in.
        self._near = [torch.empty(size) for _ in range(1 if comm.rank else comm.size - 1)]

    def step(self) -> None:
        comm, parameters = self._comm, self._parameters
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = parameters_to_vector(gradients)
        if comm.rank:
            wait([comm.Isend(flat.numpy(), 0)])
            wait([comm.Irecv(self._near[0].numpy(), 0)])
            vector_to_parameters(self._near[0], parameters)
            return
        wait([comm.Irecv(near.numpy(), 1 + i) for i, near in enumerate(self._near)])
        for near in self._near:
            flat.add_(near)
        vector_to_parameters(flat.div_(comm.size), gradients)
        self._optimizer.step()
        with torch.no_grad():
            flat = parameters_to_vector(parameters)
        wait([comm.Isend(flat.numpy(), 1 + i) for i in range(len(self._near))])


def shift(comm: Any, size: int) -> Callable[[], None]:
    """Sends ``size`` float32 to the next rank and receives as many from the one before."""
    send, receive = np.ones(size, np.float32), np.empty(size, np.float32)
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    return lambda: wait([comm.Isend(send, after), comm.Irecv(receive, before)])


class Contest:
    """All contenders, from the same model and batch. Making one is collective over ``comm``.

    Attributes:
        trainers: by name.
        turns: the same as contenders, and what is no step.
    """

    def __init__(
        self, comm: Any, agents: dict[str, Any], make: Callable[[], torch.nn.Module], batch: Any
    ) -> None:
        self._comm, self._make, self._batch = comm, make, batch
        self._closing: list[Callable[[], object]] = []
        self.trainers: dict[str, Trainer] = {}
        model = self._model()
        optimizer = sgd(model.parameters())
        self._add(LOCAL, model, optimizer.zero_grad, optimizer.step)
        for graph, joined in agents.items():
            for wire in WIRES:
                self._add_ours(f"{graph}, {wire}", joined, wire)
        self._add_ddp(DDP)
        self._add_ddp(f"{DDP}, float16", fp16_compress_hook)
        model = self._model()
        server = Server(comm, model)
        self._add(SERVER, model, server.zero, server.step)
        size = sum(p.numel() for p in model.parameters())
        self.turns = {SHIFT: Contender(shift(comm, size))}
        self.turns |= {name: Contender(one.step, one.rest) for name, one in self.trainers.items()}

    def _model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return self._make()

    def _add(self, name: str, model: torch.nn.Module, *more: Any) -> None:
        self.trainers[name] = Trainer(model, self._batch, *more)

    def _add_ours(self, name: str, agents: Any, wire: str) -> None:
        model = self._model()
        config = mpicdsgd.ExchangeConfig(transport="neighbor", wire=wire, timeout_s=120.0)
        optimizer = mpicdsgd.CDMSGD(
            model.parameters(), LR, MU, nesterov=True, agents=agents, exchange=config
        )
        self._closing.append(optimizer.close)
        self._add(name, model, optimizer.zero_grad, optimizer.step,
                  lambda: contenders.at_rest(optimizer))  # fmt: skip

    def _add_ddp(self, name: str, hook: Any = None) -> None:
        model = DistributedDataParallel(self._model(), gradient_as_bucket_view=True)
        if hook:
            model.register_comm_hook(None, hook)
        optimizer = sgd(model.parameters())
        self._add(name, model, optimizer.zero_grad, optimizer.step)

    def measure(self, rounds: int, server_rounds: int) -> common.Seconds:
        """Seconds per step in every round, on the slowest rank. Collective."""
        seconds: common.Seconds = {}
        for round_ in range(rounds):
            for name, contender in self.turns.items():
                if name != SERVER or round_ < server_rounds:
                    found = self._block(name, contender, first=round_ == 0)
                    seconds.setdefault(name, []).append(found)
        return seconds

    def _block(self, name: str, contender: Contender, *, first: bool) -> float:
        # A step of ours before leaves an exchange under way, as each of them does. DDP's first one
        # is slower. On 4 hosts the one-peer graph has two turns, and both are to be timed.
        steps = 2 if name.startswith(ONE_PEER) else 1
        contenders.gather(self._comm, [0.0])
        if name.startswith("ours") or (name.startswith(DDP) and first):
            contender.step()
        start = time.perf_counter()
        for _ in range(steps):
            contender.step()
        wall_s = time.perf_counter() - start
        contender.rest()
        return float(contenders.gather(self._comm, [wall_s]).max()) / steps

    def close(self) -> dict[str, float]:
        """The last losses, means over the ranks. Collective.

        Raises:
            RuntimeError: on every rank, where one is not finite.
        """
        losses = [float(one.loss) for one in self.trainers.values()]
        means = contenders.gather(self._comm, losses).mean(axis=0).tolist()
        for close in self._closing:
            close()
        named: dict[str, float] = dict(zip(self.trainers, means, strict=True))
        for name, mean in named.items():
            if not math.isfinite(mean):
                raise RuntimeError(f"{name}: the loss is {mean}")
        return named


# A job


def cases(quick: bool) -> dict[str, tuple[Callable[[], torch.nn.Module], int, int, int]]:
    """Model, batch size, rounds and those of the parameter server, by name."""

    def mlp() -> torch.nn.Module:
        return networks.mlp(IMAGE, CLASSES, hidden=[192 if quick else WIDTH] * 3)

    def cnn() -> torch.nn.Module:
        return networks.cnn(IMAGE, CLASSES)

    if quick:
        return {"mlp": (mlp, 8, 3, 1), "cnn": (cnn, 4, 1, 1)}
    return {"mlp": (mlp, 8, 5, 2), "cnn": (cnn, 32, 3, 1)}


def job(args: argparse.Namespace) -> common.Record:
    """All models on this job's hosts. Collective."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    address = comm.bcast(socket.gethostbyname(socket.gethostname()))
    contenders.open_gloo(comm, args.interface, address)
    mixings: dict[str, Any] = {
        RING: mpicdsgd.metropolis(mpicdsgd.ring(comm.size)),
        ONE_PEER: mpicdsgd.one_peer_exponential(comm.size),
    }
    agents = {name: mpicdsgd.Agents(comm, one, device="cpu") for name, one in mixings.items()}
    torch.manual_seed(1 + comm.rank)
    record: common.Record = {"ranks": comm.size, "parameters": {}, "batch_sizes": {}, "rounds": {}}
    record |= {
        "server_rounds": {},
        "steps": {"one-peer": 2, "others": 1},
        "losses": {},
        "results": {},
        "checks": [],
    }
    for model, (make, samples, rounds, server_rounds) in cases(args.quick).items():
        batch = torch.randn(samples, *IMAGE), torch.randint(CLASSES, (samples,))
        contest = Contest(comm, agents, make, batch)
        seconds = contest.measure(rounds, server_rounds)
        where = f"{model}, {comm.size} hosts"
        local_s = statistics.median(seconds[LOCAL])
        for name, found in seconds.items():
            row: common.Record = dict(common.spread(found))
            row["quartiles_s"] = np.quantile(found, [0.25, 0.75]).tolist()
            if name not in (LOCAL, SHIFT):
                row["computing"] = local_s / row["median_s"]
            record["results"][f"{where}: {name}"] = row
        record["losses"] |= {f"{where}: {name}": x for name, x in contest.close().items()}
        record["parameters"][model] = sum(p.numel() for p in make().parameters())
        record["batch_sizes"][model] = samples
        record["rounds"][model], record["server_rounds"][model] = rounds, server_rounds
        record["checks"] += checks_of(model, comm.size, seconds, judged=not args.quick)
    contenders.close_gloo(comm)
    return record


def checks_of(model: str, hosts: int, seconds: common.Seconds, *, judged: bool) -> list[Any]:
    checks = []

    def compare(over: str, under: str, goal: float | None = None, at_most: bool = False) -> None:
        rounds = min(len(seconds[over]), len(seconds[under]))
        value = common.ratio(seconds[over][:rounds], seconds[under][:rounds])
        name = f"{model}, {hosts} hosts: {over} over {under}"
        checks.append(common.check(name, value, goal, at_most=at_most, judged=judged))

    for over, under, goal, at_most in GOALS:
        is_goal = model == "mlp" and hosts == JUDGED_HOSTS
        compare(over, under, goal if is_goal else None, at_most)
    compare(SERVER, f"{RING}, float32")
    compare(f"{RING}, float32", SHIFT)
    return checks


# All jobs


def print_table(results: dict[str, common.Record]) -> None:
    width = max(map(len, results))
    print(f"{'seconds per step':{width}}   median  quartiles       computing")
    for name, row in results.items():
        first, third = row["quartiles_s"]
        share = f"{100 * row['computing']:6.1f} %" if "computing" in row else ""
        print(f"{name:{width}} {row['median_s']:8.3f}  {first:.3f} to {third:.3f} {share}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--hosts", help="where this is no MPI job: 4,8; with --quick: 4")
    add("--launcher", help='how to start it on n hosts: "srun -N {n} -n {n}"; default: mpiexec')
    add("--network", default="unknown", help="for the record: what joins the hosts")
    add("--interface", default="e0", help="gloo's; default: %(default)s")
    add("--quick", action="store_true", help="a smaller MLP, fewer rounds; no goal is judged")
    add("--out", type=Path)
    add("--part", type=Path, help=argparse.SUPPRESS)  # a job's record, for `collect`
    parser.set_defaults(name="network", emulate=False)
    args = parser.parse_args()

    def launcher(n: int) -> list[str]:
        return shlex.split(args.launcher.format(n=n)) if args.launcher else common.mpiexec(n)

    hosts = args.hosts or ("4" if args.quick else "4,8")
    whole = contenders.collect(args, lambda: job(args), hosts, launcher)
    if whole is None:
        return 0
    whole["network"] = args.network
    print(f"{args.network}; {whole['cpu']}, {whole['cores']} cores, one thread a rank")
    print_table(whole["results"])
    common.finish(args, whole)
    return 0


if __name__ == "__main__":
    sys.exit(main())

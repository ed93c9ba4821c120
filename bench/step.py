"""What does the exchange add to a training step, in wall and in CPU time, beside other ways?

A step is zero_grad(set_to_none=True), forward, backward and the optimizer's, on a batch that stays
what it is. Local is torch.optim.SGD with Nesterov momentum 0.9 and exchanges nothing, as torch
makes it and with fused=True. Ours is CDMSGD on the ring (two neighbours, of two agents one) and on
the one-peer exponential graph, through shared memory (*direct*) and by messages (*neighbor*).
Others, on gloo over the loopback: DistributedDataParallel, also with PostLocalSGD (parameters
averaged every 4 steps, gradients never), and Decent-DP's two ways to meet one peer a step. All in
one process a rank, in turn, in every round. Wall time is the slowest rank's, CPU time the ranks'
mean, of all their threads.

With --measuring only what run.theory = true adds to ours, direct: a step that measures itself
beside one that does not. The losses stay the same.

    python bench/step.py [--measuring] [--ranks 2,4] [--models layer,mlp,cnn] [--quick] [--out FILE]
    mpiexec -n 4 python bench/step.py ...
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import common
import contenders
import torch
import torch.distributed as dist
from contenders import Contender
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as post_local
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import mpicdsgd
from mpicdsgd.models import networks

try:
    from decent_dp.ddp import DecentralizedDataParallel
    from loguru import logger

    logger.disable("decent_dp")
except ImportError:
    DecentralizedDataParallel = None

LR, MU = 1e-4, 0.9
IMAGE, CLASSES = (1, 28, 28), 10
STEPS = 4  # in a block: PostLocalSGD's and Decent-DP's cycles divide it
LOCAL, DIRECT, NEIGHBOR = "local", "ours, direct", "ours, neighbor"
ONE_PEER = {"ours, one-peer, direct": "direct", "ours, one-peer, neighbor": "neighbor"}
DECENT = {"Decent-DP, ring": "ring", "Decent-DP, one-peer": "one-peer-exp"}
OTHERS = ("DDP", "DDP, PostLocalSGD", *DECENT)
WITHOUT_DECENT = "not installed: pip install --no-deps decent-dp==0.2.3 loguru"
CNN_BATCH = 128
MODELS = ("layer", "mlp", "cnn")
LAYER_GOAL = 1.03  # direct over local, wall
MEASURING, MEASURING_GOAL = "ours, direct, measuring", 1.02  # over direct, wall and CPU
CNN_GOALS = {DIRECT: 1.02, NEIGHBOR: 1.06}  # over local, CPU


class Trainer:
    """A model, what optimizes it, and a batch; see `Contender`.

    Args:
        step: of the optimizer; None: backward() has made it.
        zero: sets the gradients to None.
        wait: for what a step left under way.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        batch: tuple[torch.Tensor, torch.Tensor],
        zero: Callable[..., None],
        step: Callable[[], Any] | None,
        wait: Callable[[], object] = contenders.nothing,
    ) -> None:
        self._model, self._step, self._zero, self._wait = model, step, zero, wait
        self._inputs, self._targets = batch
        self.loss = torch.zeros(())

    def step(self) -> None:
        self._zero(set_to_none=True)
        loss = functional.cross_entropy(self._model(self._inputs), self._targets)
        loss.backward()
        if self._step:
            self._step()
        self.loss = loss.detach()

    def rest(self) -> None:
        self._wait()
        self._zero(set_to_none=True)  # the others need the memory


def sgd(parameters: Any, **more: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=LR, momentum=MU, nesterov=True, **more)


class Makers:
    """Makes trainers, all from the same model. Collective."""

    def __init__(self, agents: Any, make: Callable[[], torch.nn.Module], batch: Any) -> None:
        self._agents, self._make, self._batch = agents, make, batch
        self._one_peer = contenders.agents_on("one-peer")
        self.closing: list[Callable[[], object]] = []

    def model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return self._make()

    def local(self, **more: Any) -> Trainer:
        model = self.model()
        optimizer = sgd(model.parameters(), **more)
        return Trainer(model, self._batch, optimizer.zero_grad, optimizer.step)

    def ours(self, way: str, agents: Any, *, measuring: bool = False) -> Trainer:
        model = self.model()
        config = mpicdsgd.ExchangeConfig(transport=way, timeout_s=120.0)
        optimizer = mpicdsgd.CDMSGD(
            model.parameters(), LR, MU, nesterov=True, agents=agents, exchange=config
        )
        self.closing.append(optimizer.close)
        if measuring:
            optimizer.measure()
        return Trainer(model, self._batch, optimizer.zero_grad, optimizer.step,
                       lambda: contenders.at_rest(optimizer))  # fmt: skip

    def ddp(self) -> Trainer:
        model = DistributedDataParallel(self.model(), gradient_as_bucket_view=True)
        optimizer = sgd(model.parameters())
        return Trainer(model, self._batch, optimizer.zero_grad, optimizer.step)

    def post_local(self) -> Trainer:
        model = DistributedDataParallel(self.model(), gradient_as_bucket_view=True)
        # Else gradients are averaged on a node, which here is everybody, in every step.
        state = post_local.PostLocalSGDState(
            None, dist.group.WORLD, start_localSGD_iter=1, post_local_gradient_allreduce=False
        )
        model.register_comm_hook(state, post_local.post_localSGD_hook)
        averager = PeriodicModelAverager(period=STEPS)
        optimizer = PostLocalSGDOptimizer(sgd(model.parameters()), averager)
        return Trainer(model, self._batch, optimizer.zero_grad, optimizer.step)

    def decent(self, topology: str) -> Trainer:
        model = DecentralizedDataParallel(
            self.model(), lambda named: sgd([p for _, p in named]), topology=topology
        )

        def wait() -> None:
            for work in model._comm_ops:
                if work is not None:
                    work.wait()

        return Trainer(model, self._batch, model.zero_grad, None, wait)

    def measuring(self) -> dict[str, Trainer]:
        return {
            DIRECT: self.ours("direct", self._agents),
            MEASURING: self.ours("direct", self._agents, measuring=True),
        }

    def all(self) -> dict[str, Trainer]:
        made = {LOCAL: self.local(), f"{LOCAL}, fused=True": self.local(fused=True)}
        for name, way in {DIRECT: "direct", NEIGHBOR: "neighbor"}.items():
            made[name] = self.ours(way, self._agents)
        if self._agents.size > 2:  # of two agents both are the same pair
            for name, way in ONE_PEER.items():
                made[name] = self.ours(way, self._one_peer)
        made |= {"DDP": self.ddp(), "DDP, PostLocalSGD": self.post_local()}
        if DecentralizedDataParallel:
            made |= {name: self.decent(topology) for name, topology in DECENT.items()}
        return made


def measure(
    agents: Any, make: Callable[[], torch.nn.Module], batch: Any, rounds: int, measuring: bool
) -> tuple[contenders.Times, dict[str, float]]:
    """Seconds per step of everything in every round; last losses, the mean over agents. Collective.

    Raises:
        RuntimeError: on every rank, where a loss is not finite.
    """
    makers = Makers(agents, make, batch)
    trainers = makers.measuring() if measuring else makers.all()
    turns = {name: Contender(one.step, one.rest) for name, one in trainers.items()}
    times = contenders.take_turns(agents.comm, turns, rounds, STEPS)
    losses = [float(one.loss) for one in trainers.values()]
    means = contenders.gather(agents.comm, losses).mean(axis=0)
    for close in makers.closing:
        close()
    for name, mean in zip(trainers, means, strict=True):
        if not math.isfinite(mean):
            raise RuntimeError(f"{name}: the loss is {mean}")
    return times, dict(zip(trainers, means.tolist(), strict=True))


def checks_of(
    model: str, ranks: int, times: contenders.Times, batch_size: int
) -> list[common.Record]:
    where = f"{model}, {ranks} ranks"
    is_layer, is_cnn = model == "layer", model == "cnn"
    judged = not is_cnn or batch_size == CNN_BATCH  # with a smaller one there is less to compute
    checks: list[common.Record] = []

    def compare(over: str, under: str, goal: float | None, *, cpu: bool, at_most: bool) -> None:
        seconds = times.cpu if cpu else times.wall
        name = f"{where}: {over} over {under}, {'CPU' if cpu else 'wall'}"
        if over in seconds:
            value = common.ratio(seconds[over], seconds[under])
            checks.append(common.check(name, value, goal, at_most=at_most, judged=judged))

    if MEASURING in times.wall:
        for cpu in (False, True):
            compare(MEASURING, DIRECT, MEASURING_GOAL, cpu=cpu, at_most=True)
        return checks
    compared = [name for name in times.wall if name != LOCAL]
    for name in compared:
        goal = LAYER_GOAL if is_layer and name == DIRECT else None
        compare(name, LOCAL, goal, cpu=False, at_most=True)
    for name in compared:
        compare(name, LOCAL, CNN_GOALS.get(name) if is_cnn else None, cpu=True, at_most=True)
    for name in OTHERS if is_layer else ():
        compare(name, DIRECT, 1.0, cpu=False, at_most=False)
    return checks


def cases(size: int, quick: bool) -> dict[str, tuple[Callable[[], torch.nn.Module], Any]]:
    """Models and batches, by name.

    Args:
        size: parameters of the layer, about; the MLP has 0.4 of it.
    """
    side = max(2, math.isqrt(size))
    # 2 w^2 + (784 + 10) w weights of three hidden layers of width w
    width = max(2, int((math.sqrt(794**2 + 8 * 0.4 * size) - 794) / 4))

    def batch(samples: int, shape: tuple[int, ...], classes: int) -> Any:
        return torch.randn(samples, *shape), torch.randint(classes, (samples,))

    return {
        "layer": (lambda: torch.nn.Linear(side, side), batch(8, (side,), side)),
        "mlp": (
            lambda: networks.mlp(IMAGE, CLASSES, hidden=[width] * 3),
            batch(32, IMAGE, CLASSES),
        ),
        "cnn": (
            lambda: networks.cnn(IMAGE, CLASSES),
            batch(4 if quick else CNN_BATCH, IMAGE, CLASSES),
        ),
    }


def job(args: argparse.Namespace, size: int, rounds: int) -> common.Record:
    """All models on this job's ranks. Collective."""
    from mpi4py import MPI

    contenders.open_gloo(MPI.COMM_WORLD)
    agents = contenders.agents_on("ring")
    torch.manual_seed(1 + agents.rank)
    results: dict[str, Any] = {}
    losses: dict[str, float] = {}
    checks: list[common.Record] = []
    sizes: dict[str, int] = {}
    batches: dict[str, int] = {}
    for model, (make, batch) in cases(size, args.quick).items():
        if model not in args.models.split(","):
            continue
        sizes[model], batches[model] = sum(p.numel() for p in make().parameters()), len(batch[0])
        times, last = measure(agents, make, batch, rounds, args.measuring)
        where = f"{model}, {agents.size} ranks"
        for name, wall in times.wall.items():
            row = common.spread(wall)
            for kind, seconds in (("cpu", times.cpu[name]), ("system", times.system[name])):
                row[f"{kind}_s"] = common.spread(seconds)["median_s"]
            results[f"{where}: {name}"] = row
            losses[f"{where}: {name}"] = last[name]
        checks += checks_of(model, agents.size, times, batches[model])
    contenders.close_gloo(MPI.COMM_WORLD)
    return {
        "ranks": agents.size,
        "parameters": sizes,
        "batch_sizes": batches,
        "rounds": rounds,
        "steps": STEPS,
        "skipped": {} if DecentralizedDataParallel else {"Decent-DP": WITHOUT_DECENT},
        "losses": losses,
        "results": results,
        "checks": checks,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--size",
        type=int,
        default=None,
        help="parameters of the layer, 25e6; the MLP has 0.4 of it",
    )
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument("--measuring", action="store_true", help="only run.theory = true's part")
    contenders.add_arguments(parser, "step")
    args = parser.parse_args()
    args.name = "step-measuring" if args.measuring else "step"
    if unknown := set(args.models.split(",")) - set(MODELS):
        parser.error(f"--models: {', '.join(unknown)}: known are {', '.join(MODELS)}")
    rounds = 2 if args.quick else 31 if args.measuring else 11
    size = args.size or (2_000_000 if args.quick else 25_000_000)
    return contenders.run(args, lambda: job(args, size, rounds))


if __name__ == "__main__":
    sys.exit(main())

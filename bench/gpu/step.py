"""What does the exchange add to a training step? The authors' CNN, agents that share a GPU.

A step is zero_grad, forward, backward and the optimizer's: CDMSGD on the ring through *direct* and
*staged*, against torch.optim.SGD with Nesterov momentum, which exchanges nothing. All get batches
of 128 from the same data in the same way. Rounds take them in turn; a time is the slowest rank's.
"batches alone" makes and copies them, and nothing else.

    python bench/gpu/step.py [--ranks N] [--mnist FOLDER] [--cifar10 FOLDER] [--quick] [--emulate]
    mpiexec -n 5 python bench/gpu/step.py ...

Without --mnist, MPICDSGD_DATA/mnist is taken where it is; what is not given is random images.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench/, whose modules all of it shares

import common
import numpy as np
import torch

import mpicdsgd
from mpicdsgd.data.loading import Data, DataConfig, load
from mpicdsgd.data.prefetch import to_device
from mpicdsgd.data.samples import ArraySamples, Batch
from mpicdsgd.data.shuffle import Shuffler
from mpicdsgd.models import networks

SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
CLASSES = 10
LR, MOMENTUM = 0.01, 0.95  # the authors'
WARM_UP = 3  # steps


def random_data(shape: tuple[int, ...], agents: Any, samples: int) -> Data:
    random = np.random.default_rng(agents.rank)
    images = random.integers(0, 256, (samples, *shape), dtype=np.uint8)
    train = ArraySamples(images, random.integers(0, CLASSES, samples), (128.0,), (64.0,))
    return Data(train, train, (samples,) * agents.size, CLASSES, shape)


def endless(data: Data, agents: Any, batch_size: int) -> Iterator[Batch]:
    """Batches on the agent's device, epoch after epoch."""
    shuffler = Shuffler(data.shares, agents.rank, batch_size, 0, drop_last=True)
    for epoch in count():
        yield from to_device(data.train.batches(shuffler.batches(epoch), epoch), agents.device)


class Trainer:
    """A model with its optimizer and its batches. Collective where the optimizer is.

    Args:
        optimizer: from parameters.
    """

    def __init__(
        self,
        agents: Any,
        data: Data,
        batch_size: int,
        optimizer: Callable[[Iterator[torch.nn.Parameter]], Any],
    ) -> None:
        torch.manual_seed(0)
        self.model = networks.cnn(data.input_shape, CLASSES).to(agents.device)
        self.optimizer = optimizer(self.model.parameters())
        self._batches = endless(data, agents, batch_size)
        self.loss = torch.zeros(())

    def step(self) -> None:
        inputs, targets = next(self._batches)
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(self.model(inputs), targets)
        loss.backward()
        self.optimizer.step()
        self.loss = loss.detach()


def measure(
    agents: Any,
    name: str,
    data: Data,
    batch_size: int,
    rounds: int,
    steps: int,
    skipped: dict[str, str],
) -> tuple[common.Seconds, dict[str, float], int]:
    """Seconds per step of everything in every round; last losses, the mean over agents; D.

    Args:
        skipped: learns which transports cannot be had, and why.
    """

    def cdmsgd(way: str, parameters: Iterator[torch.nn.Parameter]) -> Any:
        config = mpicdsgd.ExchangeConfig(transport=way, timeout_s=60.0)
        return mpicdsgd.CDMSGD(
            parameters, LR, MOMENTUM, nesterov=True, agents=agents, exchange=config
        )

    def sgd(parameters: Iterator[torch.nn.Parameter]) -> Any:
        return torch.optim.SGD(parameters, LR, MOMENTUM, nesterov=True)

    ways = {"direct": partial(cdmsgd, "direct"), "staged": partial(cdmsgd, "staged")}
    ways["no exchange"] = sgd
    trainers = {}
    for way, make in ways.items():
        try:
            trainers[way] = Trainer(agents, data, batch_size, make)
        except mpicdsgd.UserError as error:  # on all ranks alike
            skipped[way] = str(error)
    batches = endless(data, agents, batch_size)
    jobs: dict[str, Callable[[], Any]] = {way: t.step for way, t in trainers.items()}
    jobs["batches alone"] = lambda: next(batches)
    for job in jobs.values():
        for _ in range(WARM_UP):
            job()
    seconds: common.Seconds = {}
    for _ in range(rounds):
        for way, job in jobs.items():
            found = common.block(agents, job, steps)
            seconds.setdefault(f"{name}: {way}", []).append(found)
    losses = {}
    for way, trainer in trainers.items():
        mean = sum(agents.comm.allgather(float(trainer.loss))) / agents.size
        if not np.isfinite(mean):
            raise RuntimeError(f"{name}: {way}: the loss is {mean}")
        losses[f"{name}: {way}"] = mean
    size = sum(p.numel() for p in trainers.pop("no exchange").model.parameters())
    for trainer in trainers.values():
        trainer.optimizer.close()
    return seconds, losses, size


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    given = Path(os.environ.get("MPICDSGD_DATA") or ".", "mnist")
    parser.add_argument("--ranks", type=int, default=5, help="where this is no MPI job already")
    parser.add_argument("--mnist", type=Path, default=given if given.is_dir() else None)
    parser.add_argument("--cifar10", type=Path, default=None, help="the binary version's folder")
    parser.add_argument("--batch-size", type=int, default=None, help="default: 128")
    common.add_arguments(parser, "gpu-step")
    args = parser.parse_args()
    common.start_ranks(args.ranks)
    batch_size = args.batch_size or (4 if args.emulate else 128)
    samples = 16 if args.emulate else 10_000
    rounds, steps = (2, 2) if args.emulate else (5, 20) if args.quick else (11, 50)
    torch.backends.cudnn.deterministic = True  # as `mpicdsgd train` has it

    agents = common.agents_on("ring", args.emulate)
    agents.share_cores()
    seconds: common.Seconds = {}
    losses: dict[str, float] = {}
    sizes: dict[str, int] = {}
    skipped: dict[str, str] = {}
    sources: dict[str, str] = {}
    for name, shape in SHAPES.items():
        path = getattr(args, name)
        with agents.agreement("data"):
            if path is None:
                shape = (shape[0], 8, 8) if args.emulate else shape
                data = random_data(shape, agents, samples)
                sources[name] = f"random images {shape}"
            else:
                data = load(DataConfig(name=name, path=str(path)), 0, agents.rank, agents.size)
                sources[name] = str(path)
        found, last, sizes[name] = measure(agents, name, data, batch_size, rounds, steps, skipped)
        seconds |= found
        losses |= last
    if agents.rank > 0:
        return 0

    check = partial(common.check, judged=not args.emulate)
    checks = []
    for name in SHAPES:
        for over, under in (("direct", "no exchange"), ("staged", "no exchange"),
                            ("staged", "direct")):  # fmt: skip
            if {f"{name}: {over}", f"{name}: {under}"} <= seconds.keys():
                times = common.ratio(seconds[f"{name}: {over}"], seconds[f"{name}: {under}"])
                checks.append(check(f"{name}: {over} over {under}", times, None))
        for way in ("direct", "no exchange"):
            if f"{name}: {way}" in seconds:
                median_ms = 1e3 * common.spread(seconds[f"{name}: {way}"])["median_s"]
                checks.append(check(f"{name}: {way}, ms", median_ms, None))
    results = {way: common.spread(t) for way, t in seconds.items()}
    record = {
        **common.gpu_provenance(agents.gpu, args.emulate),
        "ranks": agents.size,
        "data": sources,
        "parameters": sizes,
        "batch_size": batch_size,
        "rounds": rounds,
        "steps": steps,
        "skipped": skipped,
        "losses": losses,
        "results": results,
        "checks": checks,
    }
    print(f"{agents.gpu.name}, {agents.size} ranks, the authors' CNN, batches of {batch_size}")
    for name, source in sources.items():
        print(f"  {name}: {source}, {sizes[name]:,} parameters")
    common.print_times(results)
    for way, why in skipped.items():
        print(f"skipped: {way}: {why}")
    common.finish(args, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a user writes: a script ``mpiexec -n N python user.py VARIANT``, and functions for a run.

How their jobs end is the test.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mpi4py import MPI

import mpicdsgd

RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
STEPS = 6


def make(timeout_s: float = 20.0) -> mpicdsgd.CDMSGD:
    agents = mpicdsgd.Agents(MPI.COMM_WORLD, mpicdsgd.metropolis(mpicdsgd.ring(SIZE)))
    exchange = mpicdsgd.ExchangeConfig(timeout_s=timeout_s)
    model = torch.nn.Linear(50, 50)
    return mpicdsgd.CDMSGD(model.parameters(), lr=0.01, agents=agents, exchange=exchange)


def loop(opt: mpicdsgd.CDMSGD, steps: int = STEPS, then: Callable[[], None] | None = None) -> None:
    """``steps`` steps; rank 1 does ``then`` in the middle of the fourth."""
    (weight, bias) = opt.param_groups[0]["params"]
    for step in range(steps):
        opt.zero_grad()
        loss = torch.nn.functional.linear(torch.randn(4, 50), weight, bias).square().mean()
        loss.backward()
        if step == 3 and RANK == 1 and then is not None:
            then()
        opt.step()


def fail() -> None:
    raise RuntimeError("the user's own mistake")


def interrupt() -> None:
    raise KeyboardInterrupt


def plain() -> None:
    loop(make(), then=fail)


def in_with() -> None:
    with make() as opt:
        loop(opt, then=fail)


def in_finally() -> None:
    opt = make()
    try:
        loop(opt, then=fail)
    finally:
        opt.close()


def exit_0() -> None:
    loop(make(), then=lambda: sys.exit(0))


def exit_3() -> None:
    loop(make(), then=lambda: sys.exit(3))


def os_exit() -> None:
    loop(make(), then=lambda: os._exit(3))


def shorter() -> None:
    loop(make(), STEPS - 2 if RANK == 1 else STEPS)


def interrupted() -> None:
    loop(make(), then=interrupt)


def before_agents() -> None:
    import mpicdsgd.comm.agents  # noqa: F401

    if RANK == 1:
        fail()
    make()


def second() -> None:
    first, other = make(), make()
    loop(first)
    loop(other, then=fail)


def after_close() -> None:
    opt = make()
    loop(opt)
    opt.close()
    if RANK == 0:
        fail()
    time.sleep(30)


def sleeps() -> None:
    loop(make(timeout_s=3.0), then=lambda: time.sleep(300))


def normal() -> None:
    optimizers = [make() for _ in range(9)]  # which drain at exit, in any order
    for steps, opt in enumerate(optimizers):
        loop(opt, steps)
    print(f"rank {RANK} at its end")


def ruined_at_the_end() -> None:
    opt = make()
    bias = opt.param_groups[0]["params"][1]
    loop(opt, 4, then=lambda: bias.grad.fill_(float("nan")))


_count = 0


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    global _count
    _count += 1
    if os.environ.get("FAILS") == "loss" and RANK == 1 and _count == 3:
        fail()
    return torch.nn.functional.mse_loss(outputs, targets)


class Items:
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        if os.environ.get("FAILS") == "item" and RANK == 1 and index % 7 == 3:
            return (torch.zeros(5),)
        return torch.full((5,), float(index)), torch.zeros(2)


def data(path: str, seed: int) -> tuple[Items, Items]:
    return Items(), Items()


def model() -> torch.nn.Module:
    return torch.nn.Linear(5, 2)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    Path(f"end-of-{RANK}").touch()

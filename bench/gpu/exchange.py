"""Exchange and update of agents that share a GPU: what do time slices and tokens cost, what does
going through the host?

A step of CDMSGD, float32, with gradients that are there already, through every transport: *direct*
reads the neighbours' device memory in place, *staged* goes through page-locked host memory,
*neighbor* gives device pointers to MPI (where a probe finds that this MPI takes them). Beside them
the agents' passes alone: one agent after the other, the others idle, and all at once. Rounds take
them in turn; a time is the slowest rank's. What a card's ranks take one after the other is added
up; with cards of their own, the slowest card's counts.

    python bench/gpu/exchange.py [--ranks N] [--size D] [--quick] [--out FILE] [--emulate]
    mpiexec -n 4 python bench/gpu/exchange.py ...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench/, whose modules all of it shares

import common
import torch

import mpicdsgd
from mpicdsgd.kernels.gpu.update import DeviceUpdate

WAYS = ("direct", "staged", "neighbor")
GOAL = 5.0  # staged over direct
WARM_UP = 3  # steps

Step = Callable[[], None]


class Contender:
    """An optimizer on parameters of its own. Collective.

    Args:
        gradients: of all contenders; they stay what they are.
    """

    def __init__(self, agents: Any, way: str, gradients: list[torch.Tensor]) -> None:
        size = sum(g.numel() for g in gradients)
        model = common.parameters(size, agents.device, agents.rank)
        for parameter, gradient in zip(model, gradients, strict=True):
            parameter.grad = gradient
        config = mpicdsgd.ExchangeConfig(transport=way, timeout_s=60.0)
        self._gradients = gradients
        self.optimizer = mpicdsgd.CDMSGD(
            model, lr=common.ALPHA, momentum=common.MU, agents=agents, exchange=config
        )

    def step(self) -> None:
        torch.autograd.graph.increment_version(self._gradients)  # else they count as old ones
        self.optimizer.step()


def open_all(agents: Any, size: int, skipped: dict[str, str]) -> dict[str, Contender]:
    """A contender for each transport, but for those ``skipped``, which learns why. Collective."""
    gradients = [p.grad for p in common.parameters(size, agents.device, 1000 + agents.rank)]
    found = {}
    for way in WAYS:
        if way not in skipped:  # trying again takes time, and comes to the same
            try:
                found[way] = Contender(agents, way, gradients)
            except mpicdsgd.UserError as error:  # on all ranks alike
                skipped[way] = str(error)
    return found


def unlike(agents: Any, contenders: dict[str, Contender]) -> int:
    """Elements, of all agents, in which the others differ from the first. Collective."""
    first, *rest = (c.optimizer.context.x for c in contenders.values())
    differing = sum(int((x.view(torch.int32) != first.view(torch.int32)).sum()) for x in rest)
    return int(sum(agents.comm.allgather(differing)))


def alone(agents: Any, one_pass: Step, launches: int) -> float:
    """Seconds of all passes, one rank after the other; of the slowest card's ranks. Collective."""
    own_s = 0.0
    for rank in range(agents.size):
        agents.comm.Barrier()
        if rank == agents.rank:
            own_s = common.timed(agents.gpu, one_pass, launches)
    cards: dict[str, float] = {}
    for card, seconds in agents.comm.allgather((agents.gpu.identity, own_s)):
        cards[card] = cards.get(card, 0.0) + seconds
    return max(cards.values())


def measure(
    agents: Any, topology: str, size: int, rounds: int, steps: int, skipped: dict[str, str]
) -> tuple[common.Seconds, int]:
    """Seconds per step of everything in every round, and wrong elements. Collective."""
    contenders = open_all(agents, size, skipped)
    degree = len(agents.sources)
    buffers = common.Buffers(agents.gpu, size, {"float32": degree}, agents.rank)
    update = DeviceUpdate(agents.gpu, "float32")
    one_pass = buffers.fused(update, degree, "float32")
    for contender in contenders.values():
        for _ in range(WARM_UP):
            contender.step()
    one_pass()
    wrong = unlike(agents, contenders)
    seconds: common.Seconds = {}
    for _ in range(rounds):
        found = {way: common.block(agents, c.step, steps) for way, c in contenders.items()}
        found["passes at once"] = common.block(agents, one_pass, steps)
        found["passes alone"] = alone(agents, one_pass, steps)
        for name, value in found.items():
            seconds.setdefault(f"{topology}: {name}", []).append(value)
    wrong += unlike(agents, contenders)
    for contender in contenders.values():
        contender.optimizer.close()
    update.close()
    return seconds, wrong


def checks_of(topology: str, seconds: common.Seconds, wrong: int, judged: bool) -> list[Any]:
    check = partial(common.check, judged=judged)

    def ratio(over: str, under: str) -> float:
        return common.ratio(seconds[f"{topology}: {over}"], seconds[f"{topology}: {under}"])

    name = f"{topology}: elements unlike, between transports"
    checks = [common.check(name, wrong, 0, at_most=True)]
    for over, under, goal in (
        ("direct", "passes alone", None),
        ("passes at once", "passes alone", None),
        ("staged", "direct", GOAL),
        ("neighbor", "direct", None),
    ):
        if {f"{topology}: {over}", f"{topology}: {under}"} <= seconds.keys():
            checks.append(check(f"{topology}: {over} over {under}", ratio(over, under), goal))
        elif goal is not None:  # not reached by leaving it out
            checks.append(check(f"{topology}: {over} over {under}", 0.0, goal))
    return checks


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4, help="where this is no MPI job already")
    parser.add_argument("--size", type=int, default=None, help="parameters; default 25e6")
    parser.add_argument("--topologies", default="ring,complete", help="default: %(default)s")
    common.add_arguments(parser, "gpu-exchange")
    args = parser.parse_args()
    common.start_ranks(args.ranks)
    size = args.size or (20_000 if args.emulate else 5_000_000 if args.quick else 25_000_000)
    rounds, steps = (2, 2) if args.emulate else (5, 10) if args.quick else (11, 20)

    seconds: common.Seconds = {}
    skipped: dict[str, str] = {}
    checks: list[common.Record] = []
    unlike_elements = 0
    for topology in args.topologies.split(","):
        agents = common.agents_on(topology, args.emulate)
        found, wrong = measure(agents, topology, size, rounds, steps, skipped)
        seconds |= found
        unlike_elements += wrong
        # Alone, an agent has nobody to send anything to.
        checks += checks_of(topology, found, wrong, not args.emulate and agents.size > 1)
        cards = set(agents.comm.allgather(agents.gpu.identity))
    if agents.rank == 0:
        results = {name: common.spread(t) for name, t in seconds.items()}
        record = {
            **common.gpu_provenance(agents.gpu, args.emulate),
            "ranks": agents.size,
            "cards": len(cards),
            "parameters": size,
            "rounds": rounds,
            "steps": steps,
            "skipped": skipped,
            "results": results,
            "checks": checks,
        }
        print(f"{agents.gpu.name}, {agents.size} ranks on {len(cards)} cards, {size:,} parameters")
        common.print_times(results)
        for way, why in skipped.items():
            print(f"skipped: {way}: {why}")
        common.finish(args, record)
    return 1 if unlike_elements else 0


if __name__ == "__main__":
    sys.exit(main())

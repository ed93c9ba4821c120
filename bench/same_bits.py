"""Do two checkouts of this project train to the same bits?

Each algorithm that a config can name makes a dozen steps on 2 and on 4 ranks, with either code,
on made-up data; what mixes by a matrix with float32 and with bfloat16 on the wire, CDMSGD also by
messages. The run then goes on once more from its first checkpoint, in the middle of an epoch.
Compared are all arrays and generators of the last checkpoint of both, and the metrics, bit by bit,
but for times. Left out is what is no two times the same: a server with several agents, and GoSGD,
whose messages arrive when they do.

    python bench/same_bits.py OLD NEW [--ranks 2,4] [--only WORD] [--keep FOLDER]

OLD and NEW are checkouts. Each runs with its own .venv/bin/python and the mpiexec beside it, if it
has them, else with the current ones. Exit codes: 0 all the same, 1 not.
"""

from __future__ import annotations

import argparse
import random
import runpy
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkouts import Checkout

JOB_S = 1800
CONFIG = """
[run]
epochs = 2
checkpoint_every = "4 steps"
keep = 9
evaluate_train = true

[model]
name = "mlp"
args = { hidden = [16] }

[data]
name = "gaussians"
partition = "contiguous"
batch_size = 8
args = { samples = 48, features = 6, classes = 4, noise = 2.0, heterogeneity = 0.5 }

[optim]
lr = 0.05
"""
STEPS, FIRST = 12, 4
BY_MATRIX = {
    "cdsgd": ["optim.name=cdsgd"],
    "cdsgd, theory": ["optim.name=cdsgd", "run.theory=true"],
    "cdsgd, one-peer": ["optim.name=cdsgd", "agents.topology=expo", "agents.mixing=one-peer"],
    "icdsgd": ["optim.name=icdsgd"],
    "icdsgd, 3 rounds": ["optim.name=icdsgd", "optim.rounds=3"],
    "cdmsgd": ["optim.name=cdmsgd"],
    "cdmsgd, messages": ["optim.name=cdmsgd", "exchange.transport=neighbor"],
    "cdmsgd, Polyak": ["optim.name=cdmsgd", "optim.nesterov=false"],
    "cdmsgd, look-ahead": ["optim.name=cdmsgd", "optim.nesterov=look-ahead"],
    "cdmsgd, decay, clip, schedule": [
        "optim.name=cdmsgd", "optim.weight_decay=0.01", "optim.clip_norm=0.5",
        "optim.schedule=torch.optim.lr_scheduler:StepLR", "optim.schedule_args.step_size=1",
    ],
    "AdamW": ["optim.name=torch.optim:AdamW"],
}  # fmt: skip
OTHERS = {  # whose wire is float32
    "gossip": ["optim.name=gossip"],
    "sgd": ["optim.name=sgd"],
    "msgd": ["optim.name=msgd"],
    "msgd, Polyak": ["optim.name=msgd", "optim.nesterov=false"],
    "fedavg": ["optim.name=fedavg"],
    "fedavg, momentum": ["optim.name=fedavg", "optim.server_momentum=0.9"],
    "fedavg, fraction": ["optim.name=fedavg", "optim.fraction=0.5", "optim.server_momentum=0.5"],
    "easgd": ["optim.name=easgd", "optim.period=2"],
    "eamsgd": ["optim.name=eamsgd", "optim.period=3"],
}
ONE_AGENT = {  # and a server, on two ranks
    "downpour": ["optim.name=downpour"],
    "downpour, Adagrad": ["optim.name=downpour", "optim.adagrad=true", "optim.n_push=2"],
    "easgd, server": ["optim.name=easgd", "optim.asynchronous=true", "optim.period=2"],
    "eamsgd, server": ["optim.name=eamsgd", "optim.asynchronous=true", "optim.period=2"],
}
WIRES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """A configuration; ``ranks`` are its ``agents`` and, with some, a server."""

    name: str
    ranks: int
    agents: int
    settings: list[str]

    @property
    def folder(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in f"{self.name}-{self.ranks}")


def cases(ranks: int, only: str = "") -> list[Case]:
    """All on ``ranks`` ranks whose names have ``only`` in them."""
    found = [
        Case(f"{name}, {wire}", ranks, ranks, [*settings, f"exchange.wire={wire}"])
        for name, settings in BY_MATRIX.items()
        for wire in WIRES
    ]
    found += [Case(name, ranks, ranks, settings) for name, settings in OTHERS.items()]
    if ranks == 2:
        found += [Case(name, 2, 1, settings) for name, settings in ONE_AGENT.items()]
    return [case for case in found if only in case.name]


# In a job, by a checkout's code


def job(folder: Path, ranks: int, only: str) -> int:
    """Make all runs, each in a folder of its own, as `python -m mpicdsgd train` does. Collective.

    All in one process a rank, as a rank's start takes far longer than these runs.
    """
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    config = folder / "run.toml"
    if comm.rank == 0:
        config.write_text(CONFIG)
    comm.Barrier()
    for case in cases(ranks, only):
        run_dir = folder / case.folder / "run"
        codes = [_train(config, run_dir, case, 1)]
        comm.Barrier()
        if comm.rank == 0 and codes == [0]:
            shutil.copytree(run_dir, run_dir.with_name("whole"))
            for step in run_dir.glob("checkpoints/step-*"):
                if int(step.name.removeprefix("step-")) > FIRST:
                    shutil.rmtree(step)
        comm.Barrier()
        if codes == [0]:
            codes.append(_train(config, run_dir, case, 2))
        comm.Barrier()
        if comm.rank == 0 and codes != [0, 0]:
            (folder / case.folder).mkdir(parents=True, exist_ok=True)
            (folder / case.folder / "code").write_text(f"exit code {codes[-1]}")
    return 0


def _train(config: Path, run_dir: Path, case: Case, seed: int) -> Any:
    """The exit code of `mpicdsgd train`, in this process. Collective."""
    import numpy as np
    import torch

    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(seed)  # not where the last run left it
    sys.argv = ["mpicdsgd", "train", str(config), f"run.dir={run_dir}", *case.settings]
    try:
        runpy.run_module("mpicdsgd", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        return error.code
    return 0


# What came of it


def difference(old: Path, new: Path, agents: int) -> str:
    """What is not the same in two folders of a run; "" where nothing is."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import samerun

    lines, others = samerun.metrics(old), samerun.metrics(new)
    if len(lines) != len(others):
        return f"{len(lines)} and {len(others)} lines of metrics"
    for line, other in zip(lines, others, strict=True):
        if differing := [k for k in line.keys() | other.keys() if line.get(k) != other.get(k)]:
            return f"metrics of step {line['step']}: {', '.join(sorted(differing))}"
    state, other = samerun.last_state(old, agents), samerun.last_state(new, agents)
    if state["step"] != f"step-{STEPS:08d}":
        return f"the last checkpoint is {state['step']}"
    differing = [k for k in state.keys() | other.keys() if state.get(k) != other.get(k)]
    return f"checkpoint: {', '.join(sorted(differing))}" if differing else ""


def compare(old: Path, new: Path, case: Case) -> dict[str, str]:
    """By what was made, what is not the same; "" where all is."""
    codes = [path / case.folder / "code" for path in (old, new)]
    if any(code.exists() for code in codes):
        said = [code.read_text() if code.exists() else "done" for code in codes]
        return {"run": f"old {said[0]}, new {said[1]}"}
    return {
        name: difference(old / case.folder / part, new / case.folder / part, case.agents)
        for name, part in (("run", "whole"), ("restart", "run"))
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--ranks", default="2,4", help="default: %(default)s")
    parser.add_argument("--only", default="", metavar="WORD", help="cases with it in their name")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for the runs; default: none")
    parser.add_argument("--job", type=int, metavar="RANKS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        return job(args.old, args.job, args.only)
    with tempfile.TemporaryDirectory() as temporary:
        return sweep(args, (args.keep or Path(temporary)).resolve())


def sweep(args: argparse.Namespace, folder: Path) -> int:
    """Run and compare everything, and print the table. Returns the exit code."""
    sides = {"old": Checkout(args.old), "new": Checkout(args.new)}
    for side, checkout in sides.items():
        print(f"{side}: {checkout}")
    width = max(len(case.name) for case in cases(2))
    count = differing = 0
    for ranks in map(int, args.ranks.split(",")):
        begun = time.monotonic()
        for side, checkout in sides.items():
            own = folder / side
            own.mkdir(parents=True, exist_ok=True)
            options = ["--job", str(ranks), "--only", args.only]
            command = checkout.on_ranks(ranks, __file__, str(own), str(own), *options)
            checkout.run(command, own, JOB_S)
        print(f"{ranks} ranks, {time.monotonic() - begun:.0f} s:")
        for case in cases(ranks, args.only):
            for what, found in compare(folder / "old", folder / "new", case).items():
                count, differing = count + 1, differing + (found != "")
                text = f"DIFFERENT: {found}" if found else "same"
                print(f"  {case.name:{width}}  {what:7}  {text}", flush=True)
    print(f"{count} compared, {differing} different")
    return 1 if differing or not count else 0


if __name__ == "__main__":
    sys.exit(main())

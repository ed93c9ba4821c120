"""What does a 16-bit wire cost in accuracy? Whole runs of `mpicdsgd train`, wire against wire.

Five agents train with what they publish rounded to bfloat16 or float16, or not; their own state is
float32 always. A seed settles the shares of the data, the first parameters and the order of
samples, so a seed's wires are compared pair by pair. The table has means and standard deviations
over the seeds; in brackets the mean difference to float32 and its standard error. *Averaged* is the
average of all agents' models; *train loss* is the last epoch's running mean; *apart* is how far
the agents are from their mean (root mean square), relative to the mean's norm. Where the step size
is *falling*, it falls to 0, so that in the end rounding is most of what keeps the agents apart.

    python bench/wire.py [--mnist FOLDER] [--seeds N] [--quick] [--out FILE]
    mpiexec -n 5 python bench/wire.py ...

Each case is `mpicdsgd train jobs/mnist.toml` with the settings in the record. Without --mnist,
MPICDSGD_DATA/mnist is taken where it is; without that, and with --quick, scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import contenders
import numpy as np

import mpicdsgd
from mpicdsgd.runs.config import load_config

RANKS = 5
WIRES = ("float32", "bfloat16", "float16")
CONFIG = common.HERE.parent / "jobs" / "mnist.toml"
# The transport that does send what it counts; the bits are those of any.
ALWAYS = (
    "agents.device=cpu agents.threads=1 exchange.transport=neighbor run.evaluate_every=never "
    "run.checkpoint_every=never"
)


@dataclass(frozen=True)
class Case:
    model: str
    settings: str
    seeds: int


CASES = {
    "mlp, ring": Case("mlp", "", 5),
    "mlp, exponential": Case("mlp", "agents.topology=exponential agents.mixing=uniform", 3),
    "mlp, ring, falling": Case("mlp", "optim.schedule=cosine optim.lr=0.05", 5),
    "cnn, ring": Case("cnn", "", 8),  # the authors'; so short a run differs much by seed
}
QUICK = ("mlp, exponential", "mlp, ring, falling")
# A sample takes the CNN as long as it takes the MLP to see a hundred.
DATA = {
    ("mlp", "mnist"): "data.limit=20000 data.batch_size=64 run.epochs=3",
    ("cnn", "mnist"): "data.limit=4000 data.test_limit=1000 data.batch_size=10 run.epochs=1",
    ("mlp", "digits"): "data.name=digits data.batch_size=16 run.epochs=10",
    ("cnn", "digits"): "data.name=digits data.batch_size=16 run.epochs=4",
}

Figures = dict[str, Any]
METRICS = {"accuracy, %": ".2f", "averaged, %": ".2f", "train loss": ".4f", "apart": ".1e"}
BYTES = "bytes a step"
JUDGED = ("accuracy, %", "averaged, %")
# A smaller difference, in points, is none; nor is one whose 95% confidence interval, by Student's t
# for so many seeds, has 0 in it.
POINTS = 0.2
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
# Half of what float32 sends for the values is saved, not half of a message's header.
HEADER_BYTES = 64


def run(settings: Sequence[str]) -> Figures:
    """The figures of one run, the same on all ranks. Collective over COMM_WORLD."""
    from mpi4py import MPI

    from mpicdsgd.runs.run import Run

    comm = MPI.COMM_WORLD
    with tempfile.TemporaryDirectory(prefix="mpicdsgd-wire-") as own:
        folder = comm.bcast(own)
        made = Run(load_config(CONFIG, [*settings, f"run.dir={folder}"]), comm)
        line = comm.bcast(made.train())
        comm.Barrier()  # rank 0's folder is everybody's
    agents, optimizer = made.agents, made.optimizer
    mean_D = agents.mean(optimizer.x)[: optimizer.arena.parameters_end]
    posts = line["step"] + 1  # what they start with is published too
    return {
        "accuracy, %": 100 * line["test_accuracy"]["mean"],
        "averaged, %": 100 * line["averaged_model"]["test_accuracy"],
        "train loss": line["train_loss"]["mean"],
        "apart": line["consensus"]["rms"] / float(np.linalg.norm(mean_D.astype(np.float64))),
        BYTES: line["bytes_sent"] / posts,
        "steps": line["step"],
        "parameters": sum(p.numel() for p in made.model.parameters()),
        "readers": len(agents.destinations),
    }


def measure(
    name: str, settings: Sequence[str], seeds: int, first: bool
) -> dict[str, list[Figures]]:
    """By wire, the figures of every seed. Collective.

    Args:
        first: whether this rank says what is under way.
    """
    found: dict[str, list[Figures]] = {wire: [] for wire in WIRES}
    for seed in range(seeds):
        for wire in WIRES:
            if first:
                print(f"{name}, seed {seed}, {wire}: ", end="", file=sys.stderr, flush=True)
            found[wire].append(run([*settings, f"run.seed={seed}", f"exchange.wire={wire}"]))
    return found


def summary(runs: list[Figures], base: list[Figures]) -> common.Record:
    """Of a wire: every figure over the seeds, and its difference to ``base``, pair by pair."""
    row: common.Record = {BYTES: runs[0][BYTES]}
    for metric in METRICS:
        values = np.array([one[metric] for one in runs])
        pairs = values - [one[metric] for one in base]
        row[metric] = {
            "mean": float(values.mean()),
            "std": float(values.std(ddof=1)),
            "seeds": values.tolist(),
            "difference": float(pairs.mean()),
            "error": float(pairs.std(ddof=1) / len(pairs) ** 0.5),
        }
    return row


def checks_of(
    name: str, rows: dict[str, common.Record], seeds: int, readers: int, judged: bool
) -> list[common.Record]:
    """Args: ``judged``: whether the accuracies are."""
    checks = []
    base = rows[WIRES[0]]
    for wire in WIRES[1:]:
        for metric in JUDGED:
            one = rows[wire][metric]
            goal = round(max(POINTS, STUDENT[seeds] * one["error"]), 3)
            what = f"{name}: {wire}, difference in {metric.removesuffix(', %')}, points"
            value = abs(one["difference"])
            checks.append(common.check(what, value, goal, at_most=True, judged=judged))
        over = (rows[wire][BYTES] - base[BYTES] / 2) / readers
        what = f"{name}: {wire}, bytes a message over half of float32's"
        checks.append(common.check(what, over, HEADER_BYTES, at_most=True))
        ratio = rows[wire]["apart"]["mean"] / base["apart"]["mean"]
        checks.append(common.check(f"{name}: {wire}, apart over float32's", ratio, None))
    return checks


def print_table(record: common.Record) -> None:
    width = {metric: 2 * len(f"{0:{form}}") + 26 for metric, form in METRICS.items()}
    for name, case in record["cases"].items():
        print(f"{name}: {case['steps']} steps, {case['parameters']:,} parameters, "
              f"{case['seeds']} seeds")  # fmt: skip
        print("  " + " " * 9 + "".join(f"{m:{width[m]}}" for m in METRICS) + BYTES)
        for wire in WIRES:
            row = record["results"][f"{name}: {wire}"]
            cells = []
            for metric, form in METRICS.items():
                one = row[metric]
                text = f"{one['mean']:{form}} ± {one['std']:{form}}"
                if wire != WIRES[0]:
                    text += f" ({one['difference']:+{form}} ± {one['error']:{form}})"
                cells.append(f"{text:{width[metric]}}")
            print(f"  {wire:9}{''.join(cells)}{row[BYTES]:,.0f}")


def job(args: argparse.Namespace) -> common.Record:
    """Everything. Collective over COMM_WORLD."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    logging.getLogger("mpicdsgd").setLevel(logging.ERROR)  # else a graph's remarks at every run
    record: common.Record = {
        "ranks": comm.size,
        "data": "mnist" if args.mnist else "digits",
        "config": f"jobs/{CONFIG.name}",
        "cases": {},
        "results": {},
        "checks": [],
    }
    for name, case in CASES.items():
        if args.quick and name not in QUICK:
            continue
        settings = f"{ALWAYS} model.name={case.model} {DATA[case.model, record['data']]}"
        settings += f" {case.settings}" + (" run.epochs=2" if args.quick else "")
        where = [f"data.path={args.mnist.resolve()}"] if args.mnist else []
        seeds = args.seeds or (2 if args.quick else case.seeds)
        found = measure(name, [*settings.split(), *where], seeds, comm.rank == 0)
        rows = {wire: summary(runs, found["float32"]) for wire, runs in found.items()}
        one = found["float32"][0]
        sizes = {key: one[key] for key in ("steps", "parameters", "readers")}
        record["cases"][name] = {"settings": settings, "seeds": seeds, **sizes}
        record["results"] |= {f"{name}: {wire}": row for wire, row in rows.items()}
        record["checks"] += checks_of(name, rows, seeds, one["readers"], not args.quick)
    return record


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    given = Path(os.environ.get("MPICDSGD_DATA") or ".", "mnist")
    parser.add_argument("--mnist", type=Path, default=None)
    parser.add_argument("--seeds", type=int, choices=list(STUDENT), default=None,
                        help="default: 3, 5 or 8")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help="two cases of two epochs: no accuracy is judged")  # fmt: skip
    parser.add_argument("--out", type=Path, default=None, help="default: bench/results/wire.json")
    parser.set_defaults(emulate=False, name="wire")
    args = parser.parse_args()
    if args.mnist is None and given.is_dir() and not args.quick:
        args.mnist = given
    os.environ["OMP_NUM_THREADS"] = "1"
    common.start_ranks(RANKS)
    from mpi4py import MPI

    try:
        record = job(args)
    except mpicdsgd.UserError as error:  # on all ranks alike
        if MPI.COMM_WORLD.rank == 0:
            print(error, file=sys.stderr)
        return 2
    if MPI.COMM_WORLD.rank > 0:
        return 0
    other = "" if args.mnist else ", scikit-learn's, 8 x 8 pixels (--mnist FOLDER takes MNIST)"
    print(f"data: {record['data']}{other}")
    print_table(record)
    common.finish(args, contenders.provenance() | record)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Is this checkout of the project slower than that one? Both take turns, in one run.

Runs kernel.py, exchange.py and step.py from each of two checkouts, one after the other, for some
rounds; who is first changes by round, so what else the machine does meets both. With --start also
the start of a rank, in wall and CPU seconds: importing all that `mpicdsgd train` needs, alone, and
a whole `mpicdsgd train` of one step, evaluation and checkpoint on two ranks.

A figure is a number of a record's results: seconds of wall or CPU per step, less is better, and
fractions of the triad's bandwidth, more is better. Of each the table has

    new/old    the median of the ratios within a round, and the smallest and largest ratio
    old/old    the median of the slower half of the old runs over that of the faster half: what
               the machine makes of the same code
    WORSE      by more than 3 % and by more than old/old

of what is ours; what does not run our code (NumPy, torch, gloo, the triad) is under one line, and
tells how far to trust the rest: its new/old should be 1. --all shows it too. A --quick round is
there to try this; judge by full ones, five or more, on a machine that does nothing else.

    python bench/against.py OLD NEW [--rounds R] [--quick] [--benches kernel,exchange,step]
                            [--start] [--with 'step: --models layer'] [--all] [--out FILE]

OLD and NEW are checkouts. Each runs with its own .venv/bin/python and the mpiexec beside it, if it
has them, else with the current ones. Needs nothing but Python itself. The record, with the figures
of every run, goes to bench/results/quick/against.json or to --out. Exit codes: 0 done, whatever is
worse; 1 a bench failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkouts import Checkout

BENCHES = ("kernel", "exchange", "step")
SLOWER = 1.03
TIMEOUT_S = 3600
# What of a result is a figure, and whether more of it is better. The smallest and largest time tell
# the spread, GB/s is the time again, the kernel's share of CPU time is in ticks of its clock.
KINDS = {"median_s": False, "cpu_s": False, "of_triad": True}
IMPORTS = "import mpicdsgd.{}"
TRAIN = """
[run]
epochs = 1

[model]
name = "logistic"

[data]
name = "gaussians"
batch_size = 8
args = { samples = 16, features = 4, classes = 2 }
"""

Figures = dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Of one figure.

    Attributes:
        ratio, low, high: new over old, within a round: the median, the smallest, the largest.
        noise: old over old, >= 1; see `of_halves`. None: of one round there are no halves.
        worse: see `SLOWER`. Nothing is, where there is no noise to judge by.
    """

    ratio: float
    low: float
    high: float
    noise: float | None
    worse: bool


def kind_of(figure: str) -> str:
    return figure.rsplit(", ", 1)[1]


def figures_of(bench: str, record: dict[str, Any]) -> Figures:
    """What a bench's record has, by a name that ends with its kind; zeros tell nothing."""
    return {
        f"{bench}: {name}, {kind}": row[kind]
        for name, row in record["results"].items()
        for kind in KINDS
        if row.get(kind)
    }


def is_ours(figure: str) -> bool:
    """Whether our code ran: of *ours, direct*, *fused, degree 2* or a start."""
    bench, _, rest = figure.partition(": ")
    return bench == "start" or rest.split(": ")[-1].startswith(("ours", "fused"))


def of_halves(values: Sequence[float]) -> float | None:
    """The median of the larger half over that of the smaller: no two halves are farther apart."""
    half = len(values) // 2
    if half == 0:
        return None
    ascending = sorted(values)
    return statistics.median(ascending[-half:]) / statistics.median(ascending[:half])


def compare(old: Sequence[float], new: Sequence[float], more_is_better: bool) -> Comparison:
    """Values of one figure, a pair a round."""
    ratios = [b / a for a, b in zip(old, new, strict=True)]
    ratio, noise = statistics.median(ratios), of_halves(old)
    slower = 1 / ratio if more_is_better else ratio
    worse = noise is not None and slower > max(SLOWER, noise)
    return Comparison(ratio, min(ratios), max(ratios), noise, worse)


def compare_all(old: Sequence[Figures], new: Sequence[Figures]) -> dict[str, Comparison]:
    """Of every figure that all runs of both have.

    Args:
        old, new: a run a round.
    """
    names = [name for name in old[0] if all(name in run for run in (*old, *new))]
    return {
        name: compare([run[name] for run in old], [run[name] for run in new], KINDS[kind_of(name)])
        for name in names
    }


# What is run


def bench_figures(checkout: Checkout, bench: str, options: Sequence[str], folder: Path) -> Any:
    """The figures of one run of a checkout's bench, and its record."""
    out = folder / "record.json"
    out.unlink(missing_ok=True)
    script = str(checkout.path / "bench" / f"{bench}.py")
    checkout.run([checkout.python, script, "--out", str(out), *options], folder, TIMEOUT_S)
    record = json.loads(out.read_text())
    return figures_of(bench, record), record


def start_figures(checkout: Checkout, folder: Path) -> Figures:
    """Seconds of starts, as figures."""
    has_runs = (checkout.path / "mpicdsgd" / "runs" / "run.py").exists()
    imports = IMPORTS.format("runs.run" if has_runs else "run")
    config = folder / "start.toml"
    config.write_text(TRAIN)
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        train = ["-m", "mpicdsgd", "train", str(config), f"run.dir={run_dir}/run"]
        commands = {
            "imports": [checkout.python, "-c", imports],
            "one step on 2 ranks": checkout.on_ranks(2, *train),
        }
        found: Figures = {}
        for name, command in commands.items():
            wall_s, cpu_s = _seconds(checkout, command, folder)
            found |= {f"start: {name}, median_s": wall_s, f"start: {name}, cpu_s": cpu_s}
    return found


def _seconds(checkout: Checkout, command: Sequence[str], folder: Path) -> tuple[float, float]:
    """Wall and CPU time of ``command`` with all processes that it has waited for."""

    def cpu_s() -> float:
        times = os.times()
        return times.children_user + times.children_system

    begun, cpu_before_s = time.perf_counter(), cpu_s()
    checkout.run(command, folder, TIMEOUT_S)
    return time.perf_counter() - begun, cpu_s() - cpu_before_s


# The whole


def take_turns(
    sides: dict[str, Checkout], args: argparse.Namespace, folder: Path
) -> tuple[dict[str, list[Figures]], dict[str, Any]]:
    """Each side's figures, a run a round, and what its records begin with."""
    runs: dict[str, list[Figures]] = {side: [] for side in sides}
    about: dict[str, Any] = {side: {} for side in sides}
    if args.start:
        for checkout in sides.values():  # which reads the files once
            start_figures(checkout, folder)
    for round_ in range(args.rounds):
        turns = list(sides) if round_ % 2 == 0 else list(sides)[::-1]
        found: dict[str, Figures] = {side: {} for side in sides}
        for bench in args.benches:
            options = [*(["--quick"] if args.quick else []), *args.options.get(bench, ())]
            for side in turns:
                figures, record = bench_figures(sides[side], bench, options, folder)
                found[side] |= figures
                about[side] |= {k: record[k] for k in ("cpu", "cores", "host", "versions")}
                about[side] |= {"kernel": record["kernel"]}
        for side in turns if args.start else ():
            found[side] |= start_figures(sides[side], folder)
        for side in sides:
            runs[side].append(found[side])
        print(f"round {round_ + 1} of {args.rounds} done", file=sys.stderr)
    return runs, about


def show(compared: dict[str, Comparison], everything: bool) -> None:
    """The table; see the module's docstring."""
    ours = {name: c for name, c in compared.items() if is_ours(name)}
    others = {name: c for name, c in compared.items() if not is_ours(name)}
    shown = compared if everything else ours
    width = max(map(len, shown), default=0)
    print(f"{'':{width}}  new/old                    old/old")
    for name, c in shown.items():
        noise = "   -  " if c.noise is None else f"{c.noise:6.3f}"
        flag = "  WORSE" if c.worse and name in ours else ""
        print(f"{name:{width}}  {c.ratio:6.3f}  ({c.low:6.3f} to {c.high:6.3f})  {noise}{flag}")
    if others:
        ratios = [c.ratio for c in others.values()]
        print(f"not ours, {len(ratios)} figures: new/old {statistics.median(ratios):.3f} "
              f"({min(ratios):.3f} to {max(ratios):.3f})")  # fmt: skip
    print(f"ours, {len(ours)} figures: {sum(c.worse for c in ours.values())} worse")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    here = Path(__file__).parent
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="of the benches")
    parser.add_argument("--benches", default=",".join(BENCHES), help='default: %(default)s; or ""')
    parser.add_argument("--start", action="store_true", help="also the start of a rank")
    parser.add_argument("--with", dest="more", action="append", default=[], metavar="BENCH: OPTION",
                        help="options of a bench; may be given again")  # fmt: skip
    parser.add_argument("--all", action="store_true", help="also show what is not ours")
    parser.add_argument("--out", type=Path, default=here / "results" / "quick" / "against.json")
    args = parser.parse_args()
    args.benches = [bench for bench in args.benches.split(",") if bench]
    given = [text.partition(":") for text in args.more]
    args.options = {bench.strip(): shlex.split(options) for bench, _, options in given}
    if unknown := {*args.benches, *args.options} - set(BENCHES):
        parser.error(f"{', '.join(sorted(unknown))}: known are {', '.join(BENCHES)}")
    if args.rounds < 1 or not (args.benches or args.start):
        parser.error("nothing to run: --rounds, --benches and --start leave nothing")

    sides = {"old": Checkout(args.old), "new": Checkout(args.new)}
    for side, checkout in sides.items():
        print(f"{side}: {checkout}")
    with tempfile.TemporaryDirectory() as folder:
        runs, about = take_turns(sides, args, Path(folder))
    compared = compare_all(runs["old"], runs["new"])
    for what in ("kernel", "versions"):
        if (old := about["old"].get(what)) != (new := about["new"].get(what)):
            print(f"NOT ALIKE, {what}: old {old}, new {new}")
    show(compared, args.all)
    record = {
        "rounds": args.rounds,
        "quick": args.quick,
        "options": args.options,
        "sides": {s: {"commit": c.commit, **about[s], "runs": runs[s]} for s, c in sides.items()},
        "compared": {name: {"ours": is_ours(name), **asdict(c)} for name, c in compared.items()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

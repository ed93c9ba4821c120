"""``mpicdsgd plot``."""

from __future__ import annotations

import argparse
from pathlib import Path

from mpicdsgd.cli.arguments import Commands


def add_to(commands: Commands) -> None:
    command = commands.add_parser("plot", help="accuracy, loss and consensus distance of runs")
    command.add_argument("runs", nargs="+", metavar="RUN_DIR")
    command.add_argument(
        "--out",
        metavar="FILE",
        help="default: metrics.png, of one run in its folder, of several in this one",
    )
    command.set_defaults(run=plot)


def plot(arguments: argparse.Namespace) -> int:
    from mpicdsgd.runs.plot import plot_runs

    runs = [Path(run) for run in arguments.runs]
    # A figure of several runs belongs into no one's folder.
    default = (runs[0] if len(runs) == 1 else Path()) / "metrics.png"
    out = Path(arguments.out) if arguments.out else default
    plot_runs(runs, out)
    print(f"plot: {out}")
    return 0

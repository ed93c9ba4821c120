"""``mpicdsgd theory``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mpicdsgd.cli.arguments import Commands, add_overrides


def add_to(commands: Commands) -> None:
    command = commands.add_parser(
        "theory",
        help="a run beside the paper's bounds",
        description="Of a run made with run.theory = true; without MPI's launcher. An override "
        "says where something has moved to, as in data.path=/scratch/mnist.",
    )
    command.add_argument("run_dir", metavar="RUN_DIR")
    add_overrides(command)
    command.add_argument("--json", action="store_true")
    command.add_argument("--png", metavar="FILE", help="draw measured values and bounds")
    command.add_argument(
        "--points", type=int, default=2, metavar="K", help="where to measure; default 2"
    )
    command.add_argument(
        "--batches", type=int, default=20, metavar="B", help="minibatches at each; default 20"
    )
    command.add_argument(
        "--samples", type=int, default=1000, metavar="S",
        help="of each agent, for a network's Hessian; default 1000",
    )  # fmt: skip
    command.set_defaults(run=theory)


def theory(arguments: argparse.Namespace) -> int:
    from mpicdsgd.common.figures import check_suffix
    from mpicdsgd.theory import report, table
    from mpicdsgd.theory.measured_constants import Effort

    if arguments.png:
        check_suffix(Path(arguments.png))
    effort = Effort(arguments.points, arguments.batches, arguments.samples)
    found = report.report(Path(arguments.run_dir), arguments.overrides, effort)
    print(json.dumps(found, indent=2) if arguments.json else table.table(found))
    if arguments.png:
        from mpicdsgd.theory.plot import plot_theory

        plot_theory(found, Path(arguments.png))
        print(f"plot: {arguments.png}", file=sys.stderr if arguments.json else sys.stdout)
    return 0

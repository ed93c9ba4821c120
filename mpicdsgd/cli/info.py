"""``mpicdsgd info``."""

from __future__ import annotations

import argparse
import json

from mpicdsgd.cli.arguments import Commands


def add_to(commands: Commands) -> None:
    command = commands.add_parser(
        "info",
        help="MPI library, threads, HDF5, kernel, GPUs, algorithms, transports",
        description="Under mpirun or srun it also says how each edge's values would travel.",
    )
    command.add_argument("--topology", default="ring", metavar="SPEC", help="default: ring")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=info)


def info(arguments: argparse.Namespace) -> int:
    from mpi4py import MPI

    from mpicdsgd.cli.job_report import gather

    report = gather(MPI.COMM_WORLD, arguments.topology)
    if MPI.COMM_WORLD.rank != 0:
        return 0
    if arguments.json:
        print(json.dumps(report, indent=2))
        return 0
    edges, algorithms = report.pop("edges"), report.pop("algorithms")
    for key, value in report.items():
        if value != "":
            print(f"{key:14} {value}")
    for name, title in algorithms.items():
        print(f"{'algorithm':14} {name}: {title}")
    for edge in edges:
        print(f"edge {edge['from']:3} -> {edge['to']:3}   {edge['transport']}: {edge['why']}")
    return 0

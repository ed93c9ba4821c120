"""``mpicdsgd info``."""

from __future__ import annotations

import argparse
import json


def info(arguments: argparse.Namespace) -> int:
    from mpi4py import MPI

    from mpicdsgd.cli.job_report import gather

    report = gather(MPI.COMM_WORLD, arguments.topology)
    if MPI.COMM_WORLD.rank != 0:
        return 0
    if arguments.json:
        print(json.dumps(report, indent=2))
        return 0
    edges = report.pop("edges")
    for key, value in report.items():
        if value != "":
            print(f"{key:14} {value}")
    for edge in edges:
        print(f"edge {edge['from']:3} -> {edge['to']:3}   {edge['transport']}: {edge['why']}")
    return 0

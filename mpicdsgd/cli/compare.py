"""``mpicdsgd compare``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mpicdsgd.cli.arguments import Commands


def add_to(commands: Commands) -> None:
    command = commands.add_parser("compare", help="what runs reached and what it took, in a table")
    command.add_argument("runs", nargs="+", metavar="RUN_DIR")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=compare)


def compare(arguments: argparse.Namespace) -> int:
    from mpicdsgd.runs.compare import compare, table

    rows = compare([Path(run) for run in arguments.runs])
    print(json.dumps(rows, indent=2) if arguments.json else table(rows))
    return 0

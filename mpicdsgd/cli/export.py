"""``mpicdsgd export``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mpicdsgd.cli.arguments import Commands


def add_to(commands: Commands) -> None:
    command = commands.add_parser(
        "export", help="a checkpoint's model as safetensors: the agents' average, or one agent's"
    )
    command.add_argument("checkpoint", metavar="RUN_DIR|CHECKPOINT")
    command.add_argument("out", metavar="MODEL.safetensors")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--average", action="store_true", help="of all agents (the default)")
    which.add_argument("--agent", type=int, metavar="K")
    command.set_defaults(run=export)


def export(arguments: argparse.Namespace) -> int:
    from mpicdsgd.checkpoints.export import export

    done = export(Path(arguments.checkpoint), Path(arguments.out), arguments.agent)
    for text in done["skipped"]:
        print(f"mpicdsgd: not intact, passed over: {text}", file=sys.stderr)
    whose = "the average of" if arguments.agent is None else f"agent {arguments.agent} of"
    print(
        f"{arguments.out}: {whose} {done['agents']} agents at step {done['step']}, "
        f"{done['tensors']} tensors"
    )
    return 0

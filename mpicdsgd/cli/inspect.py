"""``mpicdsgd inspect``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mpicdsgd.cli.arguments import Commands


def add_to(commands: Commands) -> None:
    command = commands.add_parser(
        "inspect", help="what a checkpoint holds, and whether it is whole"
    )
    command.add_argument("checkpoint", metavar="RUN_DIR|CHECKPOINT")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=inspect)


def inspect(arguments: argparse.Namespace) -> int:
    """Code 1 where a checkpoint is damaged; one that is being written, or was left half, is not."""
    from mpicdsgd.checkpoints.inspect import inspect
    from mpicdsgd.common.text import agents_in_words

    found = inspect(Path(arguments.checkpoint))
    checkpoints = found["checkpoints"]
    code = 0 if all(one["intact"] or not one["finished"] for one in checkpoints) else 1
    if arguments.json:
        print(json.dumps(found, indent=2))
        return code
    for one in checkpoints:
        words = [f"{one['folder']}: step {'?' if one['step'] is None else one['step']}"]
        if one["generation"] is not None:
            words.append(f"generation {one['generation']}")
        if one["agents"] is not None:
            words += [agents_in_words(one["agents"]), f"{one['size_bytes'] / 1e6:.1f} MB"]
        words.append(
            "intact" if one["intact"] else "NOT INTACT" if one["finished"] else "not finished"
        )
        print(", ".join(words))
        if one["consensus"]:
            print(
                f"  consensus distance: max {one['consensus']['max']:.6e}, "
                f"rms {one['consensus']['rms']:.6e}"
            )
        for name, about in (one["arrays"] or {}).items():
            print(f"  {name}: {about}")
        for problem in one["problems"]:
            print(f"  {problem}")
    return code

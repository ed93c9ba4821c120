"""The commands that look at graphs, runs and checkpoints, and need no job. `cli` has the others.

Each takes the parsed arguments, prints, and returns the exit code. What it needs it imports by
itself: MPI and torch take seconds, and most can do without.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def plot(arguments: argparse.Namespace) -> int:
    from mpicdsgd.runs.plot import plot_runs

    runs = [Path(run) for run in arguments.runs]
    # A figure of several runs belongs into no one's folder.
    default = (runs[0] if len(runs) == 1 else Path()) / "metrics.png"
    out = Path(arguments.out) if arguments.out else default
    plot_runs(runs, out)
    print(f"plot: {out}")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    from mpicdsgd.runs.compare import compare, table

    rows = compare([Path(run) for run in arguments.runs])
    print(json.dumps(rows, indent=2) if arguments.json else table(rows))
    return 0


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

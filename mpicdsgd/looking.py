"""The commands that look at graphs, runs and checkpoints, and need no job. `cli` has the others.

Each takes the parsed arguments, prints, and returns the exit code. What it needs it imports by
itself: MPI and torch take seconds, and most can do without.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mpicdsgd.errors import UserError


def graph(arguments: argparse.Namespace) -> int:
    from mpicdsgd import graphreport, graphsuggest, graphtable
    from mpicdsgd.figures import check_suffix

    if arguments.png:
        check_suffix(Path(arguments.png))
    question = graphreport.Question(
        parameters=arguments.parameters,
        wire=arguments.wire,
        gamma_m=arguments.gamma,
        Q_m=arguments.Q_m,
        zeta_1=arguments.zeta_1,
        lr=arguments.lr,
        gradient_bound=arguments.gradient_bound,
    )
    if arguments.suggest:
        graphsuggest.check_words(arguments.specs, arguments.mixing)
        made = graphsuggest.suggest(arguments.agents, arguments.max_degree)
        drawn = made[:1]
    else:
        if not arguments.specs or arguments.max_degree is not None:
            raise UserError(
                "--max-degree belongs to --suggest: give that too"
                if arguments.specs
                else "no topology given: name one, as in mpicdsgd graph ring -n 5, or --suggest"
            )
        made = [
            (spec, *graphreport.graph_of(spec, arguments.agents, arguments.mixing))
            for spec in arguments.specs
        ]
        drawn = made
    reports = [graphreport.report(*one, question) for one in made]
    if arguments.json:
        print(json.dumps(reports, indent=2))
    else:
        alone = len(reports) == 1 and not arguments.suggest
        print(graphtable.details(reports[0]) if alone else graphtable.table(reports))
        if arguments.suggest:
            print(graphsuggest.config_lines(reports[0]))
    if arguments.png:
        from mpicdsgd.graphplot import draw_graphs

        draw_graphs([(graph, mixing) for _, graph, mixing in drawn], Path(arguments.png))
        print(f"drawing: {arguments.png}", file=sys.stderr if arguments.json else sys.stdout)
    return 0


def theory(arguments: argparse.Namespace) -> int:
    from mpicdsgd import theoryreport, theorytable
    from mpicdsgd.constants import Effort
    from mpicdsgd.figures import check_suffix

    if arguments.png:
        check_suffix(Path(arguments.png))
    effort = Effort(arguments.points, arguments.batches, arguments.samples)
    found = theoryreport.report(Path(arguments.run_dir), arguments.overrides, effort)
    print(json.dumps(found, indent=2) if arguments.json else theorytable.table(found))
    if arguments.png:
        from mpicdsgd.theoryplot import plot_theory

        plot_theory(found, Path(arguments.png))
        print(f"plot: {arguments.png}", file=sys.stderr if arguments.json else sys.stdout)
    return 0


def plot(arguments: argparse.Namespace) -> int:
    from mpicdsgd.plots import plot_runs

    runs = [Path(run) for run in arguments.runs]
    # A figure of several runs belongs into no one's folder.
    default = (runs[0] if len(runs) == 1 else Path()) / "metrics.png"
    out = Path(arguments.out) if arguments.out else default
    plot_runs(runs, out)
    print(f"plot: {out}")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    from mpicdsgd.comparison import compare, table

    rows = compare([Path(run) for run in arguments.runs])
    print(json.dumps(rows, indent=2) if arguments.json else table(rows))
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    """Code 1 where a checkpoint is damaged; one that is being written, or was left half, is not."""
    from mpicdsgd.graph import agents_in_words
    from mpicdsgd.inspection import inspect

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
    from mpicdsgd.exporting import export

    done = export(Path(arguments.checkpoint), Path(arguments.out), arguments.agent)
    for text in done["skipped"]:
        print(f"mpicdsgd: not intact, passed over: {text}", file=sys.stderr)
    whose = "the average of" if arguments.agent is None else f"agent {arguments.agent} of"
    print(
        f"{arguments.out}: {whose} {done['agents']} agents at step {done['step']}, "
        f"{done['tensors']} tensors"
    )
    return 0


def info(arguments: argparse.Namespace) -> int:
    from mpi4py import MPI

    from mpicdsgd.info import gather

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

"""``mpicdsgd graph``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mpicdsgd.cli.arguments import Commands
from mpicdsgd.common.errors import UserError


def add_to(commands: Commands) -> None:
    command = commands.add_parser("graph", help="what a topology and its mixing matrix are worth")
    command.add_argument(
        "specs", nargs="*", metavar="SPEC", help="ring, torus:4x4, file:net.edges; several: a table"
    )
    command.add_argument("-n", "--agents", type=int, metavar="N")
    command.add_argument(
        "--mixing", metavar="SPEC", help="default: metropolis, on directed graphs uniform"
    )
    command.add_argument(
        "--png", metavar="FILE", help="draw it, several side by side; of --suggest the best"
    )
    command.add_argument("--json", action="store_true")
    command.add_argument("--parameters", type=int, metavar="D", help="of the model, for the bytes")
    command.add_argument(
        "--wire", choices=("float32", "bfloat16", "float16"), default="float32", help="what travels"
    )
    command.add_argument(
        "--gamma", type=float, metavar="G", help="gamma_m: the largest step sizes, (14) and (15)"
    )
    command.add_argument("--Q-m", type=float, metavar="Q", help="for --gamma; default 1")
    command.add_argument("--zeta-1", type=float, metavar="Z", help="for --gamma; default 1")
    command.add_argument("--lr", type=float, metavar="ALPHA", help="the consensus radius, with")
    command.add_argument("--gradient-bound", type=float, metavar="L", help="of all agents together")
    command.add_argument(
        "--suggest", action="store_true", help="rank topologies of -n agents by gap per byte"
    )
    command.add_argument(
        "--max-degree", type=int, metavar="K", help="neighbours that an agent may have"
    )
    command.set_defaults(run=graph)


def graph(arguments: argparse.Namespace) -> int:
    from mpicdsgd.cli import graph_report, graph_suggest, graph_table
    from mpicdsgd.common.figures import check_suffix

    if arguments.png:
        check_suffix(Path(arguments.png))
    question = graph_report.Question(
        parameters=arguments.parameters,
        wire=arguments.wire,
        gamma_m=arguments.gamma,
        Q_m=arguments.Q_m,
        zeta_1=arguments.zeta_1,
        lr=arguments.lr,
        gradient_bound=arguments.gradient_bound,
    )
    if arguments.suggest:
        graph_suggest.check_words(arguments.specs, arguments.mixing)
        made = graph_suggest.suggest(arguments.agents, arguments.max_degree)
        drawn = made[:1]
    else:
        if not arguments.specs or arguments.max_degree is not None:
            raise UserError(
                "--max-degree belongs to --suggest: give that too"
                if arguments.specs
                else "no topology given: name one, as in mpicdsgd graph ring -n 5, or --suggest"
            )
        made = [
            (spec, *graph_report.graph_of(spec, arguments.agents, arguments.mixing))
            for spec in arguments.specs
        ]
        drawn = made
    reports = [graph_report.report(*one, question) for one in made]
    if arguments.json:
        print(json.dumps(reports, indent=2))
    else:
        alone = len(reports) == 1 and not arguments.suggest
        print(graph_table.details(reports[0]) if alone else graph_table.table(reports))
        if arguments.suggest:
            print(graph_suggest.config_lines(reports[0]))
    if arguments.png:
        from mpicdsgd.graphs.graph_plot import draw_graphs

        draw_graphs([(graph, mixing) for _, graph, mixing in drawn], Path(arguments.png))
        print(f"drawing: {arguments.png}", file=sys.stderr if arguments.json else sys.stdout)
    return 0

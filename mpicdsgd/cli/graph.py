"""``mpicdsgd graph``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mpicdsgd.common.errors import UserError


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

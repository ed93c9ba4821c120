"""``mpicdsgd theory``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def theory(arguments: argparse.Namespace) -> int:
    from mpicdsgd.common.figures import check_suffix
    from mpicdsgd.theory import report as theoryreport
    from mpicdsgd.theory import table as theorytable
    from mpicdsgd.theory.measured_constants import Effort

    if arguments.png:
        check_suffix(Path(arguments.png))
    effort = Effort(arguments.points, arguments.batches, arguments.samples)
    found = theoryreport.report(Path(arguments.run_dir), arguments.overrides, effort)
    print(json.dumps(found, indent=2) if arguments.json else theorytable.table(found))
    if arguments.png:
        from mpicdsgd.theory.plot import plot_theory

        plot_theory(found, Path(arguments.png))
        print(f"plot: {arguments.png}", file=sys.stderr if arguments.json else sys.stdout)
    return 0

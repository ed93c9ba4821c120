"""The command line: ``mpicdsgd train | submit | simulate | graph | theory | plot ...``.

Exit codes: 0 done, 2 a user's mistake (one line on stderr, on no rank a traceback), 80 stopped with
a checkpoint (see `stop`), 1 all else.
MPI and torch are imported by the commands that need them, so the others work on a login node.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from mpicdsgd import __version__
from mpicdsgd.cli import exit_codes, views
from mpicdsgd.cli import graph as graph_
from mpicdsgd.cli import info as info_
from mpicdsgd.cli import simulate as simulate_
from mpicdsgd.cli import submit as submit_
from mpicdsgd.cli import theory as theory_
from mpicdsgd.cli import train as running
from mpicdsgd.common.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv``; returns the exit code. ``train`` is collective."""
    code = _main(argv)
    if exit_codes.started():
        from mpicdsgd.comm import shutdown

        shutdown.leave(code)
    return code


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:  # argparse takes no overrides behind an option: train RUN.toml --agents 5 optim.lr=0.1
        if not hasattr(arguments, "overrides") or any(text.startswith("-") for text in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides += rest
    logging.basicConfig(
        format="%(message)s", level=logging.INFO if exit_codes.first() else logging.WARNING
    )
    try:
        code: int = arguments.run(arguments)
        return code
    except UserError as error:
        return exit_codes.mistake(error)
    except KeyboardInterrupt:
        # It comes twice, from the terminal and from the launcher.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return exit_codes.interrupted()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class _Parser(argparse.ArgumentParser):
    """Prints a mistake in the arguments on the first rank only; all of them leave with code 2."""

    def error(self, message: str) -> NoReturn:
        if exit_codes.first():
            super().error(message)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mpicdsgd",
        description="Decentralised training of PyTorch models over MPI.",
    )
    parser.add_argument("--version", action="version", version=f"mpicdsgd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train", help="train a model", description="Run under mpirun or srun, or with --agents."
    )
    train.add_argument("config", metavar="RUN.toml")
    train.add_argument("overrides", nargs="*", metavar="section.key=value")
    train.add_argument(
        "--agents", type=int, metavar="N", help="start N ranks with mpiexec, a server included"
    )
    train.set_defaults(run=running.train)

    simulate = commands.add_parser(
        "simulate",
        help="the same run with many agents in one process",
        description="What train does with N ranks, without MPI: as an oracle, and for more agents "
        "than a machine has cores.",
    )
    simulate.add_argument("config", metavar="RUN.toml")
    simulate.add_argument("overrides", nargs="*", metavar="section.key=value")
    simulate.add_argument("--agents", type=int, metavar="N", help="how many; required")
    simulate.add_argument(
        "--one-by-one", action="store_true", help="not many agents at a time, whatever the model"
    )
    simulate.set_defaults(run=simulate_.simulate)

    submit = commands.add_parser(
        "submit",
        help="write a Slurm batch script for a run, and submit it",
        description="The job stops with a checkpoint before its time limit, and goes on by itself.",
    )
    submit.add_argument("config", metavar="RUN.toml")
    submit.add_argument("overrides", nargs="*", metavar="section.key=value")
    submit.add_argument("--nodes", type=int, required=True, metavar="N")
    submit.add_argument("--time", required=True, metavar="H:M:S", help="the limit of each start")
    submit.add_argument(
        "--ranks-per-node", type=int, default=1, metavar="R", help="one per GPU; default 1"
    )
    submit.add_argument("--gpus-per-node", type=int, default=0, metavar="G")
    submit.add_argument(
        "--stop-before",
        type=int,
        default=120,
        metavar="SECONDS",
        help="when the run is told to stop, before the limit; default 120",
    )
    submit.add_argument(
        "--site", metavar="FILE", help="values of the site; default: MPICDSGD_SITE, jobs/site.sh"
    )
    submit.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="one more option of sbatch, as in --sbatch=--partition=gpu; may be given again",
    )
    submit.add_argument("--dry-run", action="store_true", help="only show the script")
    submit.set_defaults(run=submit_.submit)

    graph = commands.add_parser("graph", help="what a topology and its mixing matrix are worth")
    graph.add_argument(
        "specs", nargs="*", metavar="SPEC", help="ring, torus:4x4, file:net.edges; several: a table"
    )
    graph.add_argument("-n", "--agents", type=int, metavar="N")
    graph.add_argument(
        "--mixing", metavar="SPEC", help="default: metropolis, on directed graphs uniform"
    )
    graph.add_argument(
        "--png", metavar="FILE", help="draw it, several side by side; of --suggest the best"
    )
    graph.add_argument("--json", action="store_true")
    graph.add_argument("--parameters", type=int, metavar="D", help="of the model, for the bytes")
    graph.add_argument(
        "--wire", choices=("float32", "bfloat16", "float16"), default="float32", help="what travels"
    )
    graph.add_argument(
        "--gamma", type=float, metavar="G", help="gamma_m: the largest step sizes, (14) and (15)"
    )
    graph.add_argument("--Q-m", type=float, metavar="Q", help="for --gamma; default 1")
    graph.add_argument("--zeta-1", type=float, metavar="Z", help="for --gamma; default 1")
    graph.add_argument("--lr", type=float, metavar="ALPHA", help="the consensus radius, with")
    graph.add_argument("--gradient-bound", type=float, metavar="L", help="of all agents together")
    graph.add_argument(
        "--suggest", action="store_true", help="rank topologies of -n agents by gap per byte"
    )
    graph.add_argument(
        "--max-degree", type=int, metavar="K", help="neighbours that an agent may have"
    )
    graph.set_defaults(run=graph_.graph)

    theory = commands.add_parser(
        "theory",
        help="a run beside the paper's bounds",
        description="Of a run made with run.theory = true; without MPI's launcher. An override "
        "says where something has moved to, as in data.path=/scratch/mnist.",
    )
    theory.add_argument("run_dir", metavar="RUN_DIR")
    theory.add_argument("overrides", nargs="*", metavar="section.key=value")
    theory.add_argument("--json", action="store_true")
    theory.add_argument("--png", metavar="FILE", help="draw measured values and bounds")
    theory.add_argument(
        "--points", type=int, default=2, metavar="K", help="where to measure; default 2"
    )
    theory.add_argument(
        "--batches", type=int, default=20, metavar="B", help="minibatches at each; default 20"
    )
    theory.add_argument(
        "--samples", type=int, default=1000, metavar="S",
        help="of each agent, for a network's Hessian; default 1000",
    )  # fmt: skip
    theory.set_defaults(run=theory_.theory)

    plot = commands.add_parser("plot", help="accuracy, loss and consensus distance of runs")
    plot.add_argument("runs", nargs="+", metavar="RUN_DIR")
    plot.add_argument(
        "--out",
        metavar="FILE",
        help="default: metrics.png, of one run in its folder, of several in this one",
    )
    plot.set_defaults(run=views.plot)

    compare = commands.add_parser("compare", help="what runs reached and what it took, in a table")
    compare.add_argument("runs", nargs="+", metavar="RUN_DIR")
    compare.add_argument("--json", action="store_true")
    compare.set_defaults(run=views.compare)

    inspect = commands.add_parser(
        "inspect", help="what a checkpoint holds, and whether it is whole"
    )
    inspect.add_argument("checkpoint", metavar="RUN_DIR|CHECKPOINT")
    inspect.add_argument("--json", action="store_true")
    inspect.set_defaults(run=views.inspect)

    export = commands.add_parser(
        "export", help="a checkpoint's model as safetensors: the agents' average, or one agent's"
    )
    export.add_argument("checkpoint", metavar="RUN_DIR|CHECKPOINT")
    export.add_argument("out", metavar="MODEL.safetensors")
    which = export.add_mutually_exclusive_group()
    which.add_argument("--average", action="store_true", help="of all agents (the default)")
    which.add_argument("--agent", type=int, metavar="K")
    export.set_defaults(run=views.export)

    info = commands.add_parser(
        "info",
        help="MPI library, threads, HDF5, kernel, GPUs, transports",
        description="Under mpirun or srun it also says how each edge's values would travel.",
    )
    info.add_argument("--topology", default="ring", metavar="SPEC", help="default: ring")
    info.add_argument("--json", action="store_true")
    info.set_defaults(run=info_.info)
    return parser

"""``mpicdsgd train``."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from pathlib import Path
from typing import NoReturn

from mpicdsgd.cli import exit_codes, launch
from mpicdsgd.cli.arguments import Commands, add_config
from mpicdsgd.common import signals
from mpicdsgd.common.errors import UserError


def add_to(commands: Commands) -> None:
    command = commands.add_parser(
        "train", help="train a model", description="Run under mpirun or srun, or with --agents."
    )
    add_config(command)
    command.add_argument(
        "--agents", type=int, metavar="N", help="start N ranks with mpiexec, a server included"
    )
    command.set_defaults(run=train)


def _on_interrupt(number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_codes.interrupted()
    os._exit(1)


def train(arguments: argparse.Namespace) -> int:
    if arguments.agents is not None and not launch.inside_job():
        launch.relaunch(arguments.agents, ["train", arguments.config, *arguments.overrides])
    signals.catch()  # first of all: a signal may come while torch is imported
    from mpi4py import MPI

    from mpicdsgd.algorithms.config import needs_server, uses_graph
    from mpicdsgd.comm import shutdown
    from mpicdsgd.comm.agreement import Silence, agreement
    from mpicdsgd.comm.exchange.errors import ExchangeError
    from mpicdsgd.runs.config import load_config
    from mpicdsgd.runs.summary import summary
    from mpicdsgd.runs.train import train as train_run

    shutdown.install()
    # Not as an exception: raised in a weak reference's callback, Python prints and forgets it.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _on_interrupt)
    comm = MPI.COMM_WORLD
    if text := launch.lonely(os.environ, comm.size, MPI.Get_library_version()):
        raise UserError(text)
    with agreement(comm, "reading the config"):
        if arguments.agents not in (None, comm.size):
            raise UserError(
                f"--agents {arguments.agents}, but the launcher started {comm.size} ranks: leave "
                "--agents out under mpirun or srun"
            )
        config = load_config(Path(arguments.config), arguments.overrides)
    try:
        code, last = train_run(config, comm)
    except (ExchangeError, Silence) as error:
        return exit_codes.waited_in_vain(str(error))
    except MPI.Exception as error:
        if not exit_codes.of_another(error):
            raise
        said = error.Get_error_string().strip().splitlines()[-1]  # MPICH's are a stack
        return exit_codes.waited_in_vain(
            f"MPI fails, as it does when a rank or a node is gone ({said})"
        )
    signals.ignore()
    if shutdown.is_first() and last is not None and code == 0:
        where = f" on {config.agents.topology}" if uses_graph(config.optim) else ""
        where += " and a server" if needs_server(config.optim) else ""
        print(summary(last, where, config.run.dir))
    return code

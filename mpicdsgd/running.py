"""What the commands that run or start something do: train, simulate, submit."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

from mpicdsgd import ending, launch, stopsignals
from mpicdsgd.errors import UserError


def _on_interrupt(number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ending.interrupted()
    os._exit(1)


def train(arguments: argparse.Namespace) -> int:
    if arguments.agents is not None and not launch.inside_job():
        launch.relaunch(arguments.agents, ["train", arguments.config, *arguments.overrides])
    stopsignals.catch()  # first of all: a signal may come while torch is imported
    from mpi4py import MPI

    from mpicdsgd import job, shutdown
    from mpicdsgd.agreement import Silence, agreement
    from mpicdsgd.algorithms.settings import needs_server, uses_graph
    from mpicdsgd.exchange import ExchangeError
    from mpicdsgd.progress import summary
    from mpicdsgd.runconfig import load_config

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
        code, last = job.train(config, comm)
    except (ExchangeError, Silence) as error:
        return ending.waited_in_vain(str(error))
    except MPI.Exception as error:
        if not ending.of_another(error):
            raise
        said = error.Get_error_string().strip().splitlines()[-1]  # MPICH's are a stack
        return ending.waited_in_vain(
            f"MPI fails, as it does when a rank or a node is gone ({said})"
        )
    stopsignals.ignore()
    if shutdown.is_first() and last is not None and code == 0:
        where = f" on {config.agents.topology}" if uses_graph(config.optim) else ""
        where += " and a server" if needs_server(config.optim) else ""
        print(summary(last, where, config.run.dir))
    return code


def simulate(arguments: argparse.Namespace) -> int:
    if arguments.agents is None:
        raise UserError("simulate needs --agents N, the number of agents, at least 1")
    if arguments.agents < 1:
        raise UserError(f"--agents must be at least 1, got {arguments.agents}")
    from mpi4py import MPI

    from mpicdsgd.progress import summary
    from mpicdsgd.runconfig import load_config
    from mpicdsgd.simulation import Simulation

    if MPI.COMM_WORLD.size > 1:
        error = UserError(
            f"simulate is one process, but the launcher started {MPI.COMM_WORLD.size} ranks: leave "
            "mpirun or srun out, or use train"
        )
        error.raised_on_all_ranks = True
        raise error
    config = load_config(Path(arguments.config), arguments.overrides)
    simulation = Simulation(config, arguments.agents, one_by_one=arguments.one_by_one)
    try:
        last = simulation.run()
    except KeyboardInterrupt:
        print(
            f"mpicdsgd: interrupted after step {simulation.steps}; what was written is kept in "
            f"{config.run.dir}",
            file=sys.stderr,
        )
        return 1
    print(summary(last, f" on {config.agents.topology}", config.run.dir))
    return 0


def submit(arguments: argparse.Namespace) -> int:
    from mpicdsgd import submit as batch

    site = Path(arguments.site) if arguments.site else batch.default_site()
    request = batch.Request(
        nodes=arguments.nodes,
        time=arguments.time,
        ranks_per_node=arguments.ranks_per_node,
        gpus_per_node=arguments.gpus_per_node,
        stop_before_s=arguments.stop_before,
        site=site,
        options=tuple(arguments.sbatch),
    )
    run_dir, text = batch.script(Path(arguments.config), arguments.overrides, request)
    print(text, end="")
    if not arguments.dry_run:
        print(batch.submit(run_dir, text, site))
    return 0

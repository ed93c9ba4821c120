"""``mpicdsgd simulate``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mpicdsgd.cli.arguments import Commands, add_config
from mpicdsgd.common.errors import UserError


def add_to(commands: Commands) -> None:
    command = commands.add_parser(
        "simulate",
        help="the same run with many agents in one process",
        description="What train does with N ranks, without MPI: as an oracle, and for more agents "
        "than a machine has cores.",
    )
    add_config(command)
    command.add_argument("--agents", type=int, metavar="N", help="how many; required")
    command.add_argument(
        "--one-by-one", action="store_true", help="not many agents at a time, whatever the model"
    )
    command.set_defaults(run=simulate)


def simulate(arguments: argparse.Namespace) -> int:
    if arguments.agents is None:
        raise UserError("simulate needs --agents N, the number of agents, at least 1")
    if arguments.agents < 1:
        raise UserError(f"--agents must be at least 1, got {arguments.agents}")
    from mpi4py import MPI

    from mpicdsgd.runs.config import load_config
    from mpicdsgd.runs.summary import summary
    from mpicdsgd.simulation.simulation import Simulation

    if MPI.COMM_WORLD.size > 1:
        raise UserError(
            f"simulate is one process, but the launcher started {MPI.COMM_WORLD.size} ranks: leave "
            "mpirun or srun out, or use train"
        ).everywhere()
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

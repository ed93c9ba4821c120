"""A whole run on the ranks of a job: agents, and a server where the algorithm has one."""

from __future__ import annotations

import logging
from typing import Any

from mpi4py import MPI

from mpicdsgd.algorithms.config import needs_server
from mpicdsgd.algorithms.server.server import Server
from mpicdsgd.comm.agreement import require_same
from mpicdsgd.common.errors import UserError
from mpicdsgd.common.text import agents_in_words
from mpicdsgd.runs import survival
from mpicdsgd.runs.config import Config
from mpicdsgd.runs.run import Run

log = logging.getLogger("mpicdsgd")


def train(config: Config, comm: MPI.Intracomm) -> tuple[int, dict[str, Any] | None]:
    """Do the whole run of ``config`` on the ranks of ``comm``. Collective.

    Where the algorithm has a server it is the last rank, and the others are the agents.

    Returns:
        The exit code, and the last line of metrics (None on a server's rank).

    Raises:
        UserError: on every rank, or on every rank but the server, which then returns code 2.
    """
    require_same(comm, "the config", repr(config.optim))  # else one waits for a server, or as one
    if not needs_server(config.optim):
        if config.agents.on_death == "continue":
            return survival.train(config, comm)
        run = Run(config, comm)
        last = run.train()
        return run.code, last
    require_same(comm, "the config", repr(config))
    server = Server(comm)
    if server.is_here:
        return server.serve(), None
    if server.comm.rank == 0:
        agents = agents_in_words(server.comm.size)
        log.info("%s, and rank %d as the server", agents, server.rank)
    try:
        run = Run(config, server.comm, server)
        last = run.train()
    except UserError:
        server.close(2)
        raise
    server.close(run.code)
    return run.code, last

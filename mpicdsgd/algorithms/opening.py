"""What an algorithm communicates over, opened for the agents of a job."""

from __future__ import annotations

from mpicdsgd.algorithms.contract import (
    COLUMN,
    GRADIENTS,
    GRAPH,
    KINDS,
    SERVER,
    Algorithm,
)
from mpicdsgd.algorithms.registry import uses_edges
from mpicdsgd.algorithms.server.client import Client
from mpicdsgd.algorithms.server.server import Server
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.communication import Communication
from mpicdsgd.comm.exchange.opening import ExchangeConfig, open_exchange
from mpicdsgd.comm.links.allreduce import SUMS
from mpicdsgd.comm.links.assembly import Assembly
from mpicdsgd.comm.links.mean_gradients import MeanGradients
from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs.mixing_cycle import Mixing
from mpicdsgd.kernels.arena import Arena


def open_communication(
    algorithm: Algorithm,
    label: str,
    agents: Agents,
    arena: Arena,
    config: ExchangeConfig,
    server: Server | None,
) -> Communication:
    """Open it. Collective over ``agents``.

    Args:
        label: how messages call the algorithm.

    Raises:
        UserError: on every rank, for a graph, matrix or setting that the algorithm does not admit.
    """
    over = algorithm.over
    with agents.agreement("the exchange's settings"):
        check_admitted(algorithm, label, agents.mixing)
        if config.sums not in SUMS:
            raise UserError(f'exchange.sums must be one of {", ".join(SUMS)}, got "{config.sums}"')
        if over != GRAPH:
            _check_edgeless(label, config)
        if over == SERVER and server is None:
            raise UserError(f"{label} needs a server: the last rank in Server.serve()")
    if uses_edges(type(algorithm)):
        agents.remark(agents.graph.remarks)
    if over == GRAPH:
        agents.remark(agents.mixing.remarks)
        return open_exchange(agents, arena.size * len(algorithm.sends), config)
    every, timeout_s = algorithm.signals, config.timeout_s
    if over == GRADIENTS:
        return MeanGradients(agents, arena, every, timeout_s, config.sums == "ordered")
    if over == SERVER:
        assert server is not None
        return Client(
            agents, server, arena, every, timeout_s,
            kind=algorithm.server_rule, elasticity=getattr(algorithm, "elasticity", 0.0),
        )  # fmt: skip
    assert over in KINDS
    return Assembly(agents, every, timeout_s)


def check_admitted(algorithm: Algorithm | type[Algorithm], label: str, mixing: Mixing) -> None:
    """Raise a UserError for a graph or a matrix that the algorithm does not admit. Local."""
    admits = algorithm.admits
    if len(mixing.turns) > 1 and (admits is None or not admits.changing):
        why = "mixes by no matrix" if algorithm.over != GRAPH else "needs one that stays as it is"
        raise UserError(
            f"mixing {mixing.name} changes by step, but {label} {why}: give one "
            'that does not change, as mixing = "metropolis"'
        )
    if admits is None:
        return
    if mixing.graph.directed and not admits.directed:
        raise UserError(
            f"{label} {admits.undirected_because or 'needs an undirected graph'}: use another "
            f"topology{admits.instead}"
        )
    if algorithm.over == GRAPH and mixing.stochastic == COLUMN and admits.matrix != COLUMN:
        raise UserError(
            f"mixing {mixing.name} is column-stochastic, with which {label} would not reach the "
            "agents' mean: use a doubly stochastic matrix, or optim.name = "
            '"push-sum", which corrects for it'
        )


def _check_edgeless(label: str, config: ExchangeConfig) -> None:
    """Raise a UserError for what only publishing on a graph's edges has."""
    if config.wire != "float32":
        raise UserError(f'exchange.wire = "{config.wire}": {label} exchanges float32 only')
    if config.transport != "auto":
        raise UserError(
            f'exchange.transport = "{config.transport}": {label} has no graph\'s edges to choose '
            'one for, leave it at "auto"'
        )
    if not config.timeout_s > 0:
        raise UserError(f"exchange.timeout_s must be positive, got {config.timeout_s}")

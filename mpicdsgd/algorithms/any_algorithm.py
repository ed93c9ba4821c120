"""The optimizer of any algorithm, by its name or its class."""

from __future__ import annotations

import dataclasses
from typing import Any

from mpicdsgd.algorithms import registry
from mpicdsgd.algorithms.contract import Algorithm, Circumstances
from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.algorithms.server.server import Server
from mpicdsgd.comm.agents import Agents
from mpicdsgd.common.errors import UserError


def optimizer(
    algorithm: str | type[Algorithm],
    params: Any,
    *,
    agents: Agents,
    run: Circumstances | None = None,
    server: Server | None = None,
    **more: Any,
) -> AgentOptimizer:
    """The optimizer of any algorithm. Collective over ``agents``.

    Args:
        algorithm: a name as a config has it ("gradient-tracking"), "package.module:Class" of your
            own, or the class.
        run: what the algorithm must know of the run; the default has one step in an epoch.
        more: settings of the algorithm, and ``buffers, exchange, debug`` of `AgentOptimizer`.

    Raises:
        UserError: on every rank, for a name or a setting that there is not.
    """
    with agents.agreement("optimizer()"):
        if isinstance(algorithm, str):
            if ":" not in algorithm and algorithm not in registry.algorithms():
                raise UserError(
                    f'unknown algorithm "{algorithm}": known are {", ".join(registry.algorithms())}'
                )
            kind = registry.find(algorithm)
            if kind is None:
                raise UserError(f"{algorithm} is a torch optimizer: make one, and give it to Mixed")
        else:
            kind = algorithm
        names = registry.setting_names(kind)
        common = {key: more.pop(key) for key in ("buffers", "exchange", "debug") if key in more}
        if unknown := sorted(set(more) - set(names)):
            raise UserError(
                f"{kind.name or kind.__name__} has no setting {unknown[0]}: it has "
                f"{', '.join(names)}"
            )
        settings = kind.Settings(**more)
        circumstances = dataclasses.replace(run or Circumstances(), agents=agents.size)
    made = kind.of(settings)(settings, circumstances)
    return AgentOptimizer(params, made, agents, server=server, **common)

"""An optimizer from a run's config."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any

import torch

from mpicdsgd.algorithms.config import OptimConfig, is_torch, kind_of, settings_of
from mpicdsgd.algorithms.contract import Circumstances
from mpicdsgd.algorithms.mixed import Mixed
from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.algorithms.server.server import Server
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.opening import ExchangeConfig
from mpicdsgd.common import plugins
from mpicdsgd.common.errors import UserError


def make_optimizer(
    config: OptimConfig,
    parameters: Iterable[torch.Tensor],
    agents: Agents,
    exchange: ExchangeConfig,
    run: Circumstances,
    server: Server | None,
    buffers: Iterable[torch.Tensor] = (),
) -> AgentOptimizer:
    """The optimizer that ``config`` names. Collective over ``agents``.

    Args:
        run: what the algorithm must know of the run.
        server: where the algorithm needs one.

    Raises:
        UserError: for arguments that the optimizer does not take, by their names in the config;
            they are the same on all ranks, so it is raised on all.
    """
    common: dict[str, Any] = {"buffers": buffers, "exchange": exchange, "debug": config.debug}
    if is_torch(config):
        return Mixed(torch_optimizer(config, parameters), agents, **common)
    settings = settings_of(config)
    algorithm = kind_of(config)(settings, run)
    try:
        algorithm.check(agents.size)
        settings.coefficients(dataclasses.asdict(settings))
    except UserError as error:  # every setting's message begins with its name
        raise UserError(f"optim.{error}") from None
    return AgentOptimizer(parameters, algorithm, agents, server=server, **common)


def torch_optimizer(
    config: OptimConfig, parameters: Iterable[torch.Tensor]
) -> torch.optim.Optimizer:
    """The torch optimizer that ``config`` names. Local.

    Raises:
        UserError: for arguments that it does not take.
    """
    kind = plugins.load_function(config.name, "optim.name")
    for key in ("lr", "weight_decay"):
        if key in config.args:
            raise UserError(f"optim.args.{key}: set optim.{key} instead")
    try:
        takes_decay = "weight_decay" in inspect.signature(kind).parameters
        decay = {"weight_decay": config.weight_decay} if takes_decay else {}
        made = kind(parameters, lr=config.lr, **decay, **config.args)
    except (TypeError, ValueError) as error:
        raise UserError(f"optim.name = {config.name} with optim.args: {error}") from None
    if not isinstance(made, torch.optim.Optimizer):
        raise UserError(f"optim.name = {config.name} makes no torch optimizer")
    if config.weight_decay and not takes_decay:
        raise UserError(f"optim.weight_decay: {config.name} does not take one, set it to 0")
    return made

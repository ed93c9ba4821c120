"""An optimizer and its step size schedule from a run's config."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from mpicdsgd.algorithms.cdmsgd import CDMSGD
from mpicdsgd.algorithms.cdsgd import CDSGD
from mpicdsgd.algorithms.config import OptimConfig
from mpicdsgd.algorithms.downpour import Downpour
from mpicdsgd.algorithms.easgd import EAMSGD, EASGD
from mpicdsgd.algorithms.fedavg import FedAvg
from mpicdsgd.algorithms.gossip import GoSGD, GossipSGD
from mpicdsgd.algorithms.mixed import Mixed
from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.algorithms.server.server import Server
from mpicdsgd.algorithms.sgd import MSGD, SGD
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.opening import ExchangeConfig
from mpicdsgd.common import plugins
from mpicdsgd.common.errors import UserError


@dataclass(frozen=True)
class Circumstances:
    """What an algorithm must know of its run.

    Attributes:
        steps_per_epoch, shift: of the run's `runs.epochs.Course`.
        seed: of the run.
        samples: of this agent.
        server: where `settings.needs_server`.
    """

    steps_per_epoch: int
    samples: int
    seed: int
    server: Server | None
    shift: int = 0


def make_optimizer(
    config: OptimConfig,
    parameters: Iterable[torch.Tensor],
    agents: Agents,
    exchange: ExchangeConfig,
    circumstances: Circumstances,
    buffers: Iterable[torch.Tensor] = (),
) -> AgentOptimizer:
    """The optimizer that ``config`` names. Collective over ``agents``.

    Raises:
        UserError: for arguments that the optimizer does not take, by their names in the config;
            they are the same on all ranks, so it is raised on all.
    """
    common: dict[str, Any] = {
        "agents": agents, "buffers": buffers, "exchange": exchange, "debug": config.debug,
    }  # fmt: skip
    if ":" in config.name:
        return _mixed(config, parameters, common)
    own: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    momentum: dict[str, Any] = {"momentum": config.momentum, "nesterov": config.nesterov}
    elastic = {
        "period": config.period,
        "elasticity": config.elasticity or None,
        "server": circumstances.server,
    }
    rounds = {"rounds": config.rounds}
    gossip = {"probability": config.probability, "seed": circumstances.seed}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "cdsgd": (CDSGD, rounds),
        "icdsgd": (CDSGD, rounds),
        "cdmsgd": (CDMSGD, {**rounds, **momentum}),
        "sgd": (SGD, {}),
        "msgd": (MSGD, momentum),
        "fedavg": (
            FedAvg,
            {
                "period": config.local_epochs * circumstances.steps_per_epoch,
                "shift": circumstances.shift,
                "fraction": config.fraction,
                "samples": circumstances.samples,
                "server_momentum": config.server_momentum,
                "seed": circumstances.seed,
            },
        ),
        "easgd": (EASGD, elastic),
        "eamsgd": (EAMSGD, {**elastic, "momentum": config.momentum}),
        "downpour": (
            Downpour,
            {
                "server": circumstances.server,
                "n_push": config.n_push,
                "n_fetch": config.n_fetch,
                "adagrad": config.adagrad,
            },
        ),
        "gossip": (GossipSGD, gossip),
        "gosgd": (GoSGD, gossip),
    }
    kind, arguments = kinds[config.name]
    try:
        made: AgentOptimizer = kind(parameters, **own, **arguments, **common)
    except UserError as error:
        raise _by_its_key(error) from None
    return made


def _by_its_key(error: UserError) -> UserError:
    """``error`` of an optimizer's argument, as one of the key that it came from."""
    if str(error).split(" ")[0] not in {field.name for field in dataclasses.fields(OptimConfig)}:
        return error
    found = UserError(f"optim.{error}")
    found.raised_on_all_ranks = error.raised_on_all_ranks
    return found


def _mixed(
    config: OptimConfig, parameters: Iterable[torch.Tensor], common: dict[str, Any]
) -> AgentOptimizer:
    kind = plugins.load_function(config.name, "optim.name")
    for key in ("lr", "weight_decay"):
        if key in config.args:
            raise UserError(f"optim.args.{key}: set optim.{key} instead")
    try:
        takes_decay = "weight_decay" in inspect.signature(kind).parameters
        decay = {"weight_decay": config.weight_decay} if takes_decay else {}
        inner = kind(parameters, lr=config.lr, **decay, **config.args)
    except (TypeError, ValueError) as error:
        raise UserError(f"optim.name = {config.name} with optim.args: {error}") from None
    if not isinstance(inner, torch.optim.Optimizer):
        raise UserError(f"optim.name = {config.name} makes no torch optimizer")
    if config.weight_decay and not takes_decay:
        raise UserError(f"optim.weight_decay: {config.name} does not take one, set it to 0")
    return Mixed(inner, **common)

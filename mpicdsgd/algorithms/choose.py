"""An optimizer and its step size schedule from a run's config."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from mpicdsgd import plugins, schedule
from mpicdsgd.agents import Agents
from mpicdsgd.algorithms.cdmsgd import CDMSGD
from mpicdsgd.algorithms.cdsgd import CDSGD
from mpicdsgd.algorithms.downpour import Downpour
from mpicdsgd.algorithms.easgd import EAMSGD, EASGD
from mpicdsgd.algorithms.fedavg import FedAvg
from mpicdsgd.algorithms.gossip import GoSGD, GossipSGD
from mpicdsgd.algorithms.mixed import Mixed
from mpicdsgd.algorithms.sgd import MSGD, SGD
from mpicdsgd.errors import UserError
from mpicdsgd.exchange import ExchangeConfig
from mpicdsgd.links.server import Server
from mpicdsgd.optim import AgentOptimizer

log = logging.getLogger("mpicdsgd")

NAMES = (
    "cdsgd",
    "cdmsgd",
    "icdsgd",
    "sgd",
    "msgd",
    "fedavg",
    "easgd",
    "eamsgd",
    "downpour",
    "gossip",
    "gosgd",
)

_ELASTIC = ("easgd", "eamsgd")
_ONLY_OF = {  # settings that only these algorithms have
    "rounds": ("cdsgd", "cdmsgd", "icdsgd"),
    "local_epochs": ("fedavg",),
    "fraction": ("fedavg",),
    "server_momentum": ("fedavg",),
    "period": _ELASTIC,
    "elasticity": _ELASTIC,
    "asynchronous": _ELASTIC,
    "n_push": ("downpour",),
    "n_fetch": ("downpour",),
    "adagrad": ("downpour",),
    "probability": ("gossip", "gosgd"),
}


@dataclass(frozen=True)
class OptimConfig:
    """Section ``[optim]`` of a run's config."""

    name: str = "cdmsgd"  # see NAMES, or any torch optimizer as "torch.optim:AdamW"
    lr: float = 0.01
    momentum: float = 0.95
    nesterov: bool | str = True  # false: Polyak; "look-ahead"
    weight_decay: float = 0.0
    rounds: int = 1  # cdsgd, cdmsgd, icdsgd: mixing rounds per step, tau
    local_epochs: int = 1  # fedavg: E
    fraction: float = 1.0  # fedavg: C, of the agents that take part in a round
    server_momentum: float = 0.0  # fedavg
    period: int = 4  # easgd, eamsgd: steps between two pulls, tau
    elasticity: float = 0.0  # easgd, eamsgd: e = alpha rho; 0: 0.9 / agents
    asynchronous: bool = False  # easgd, eamsgd: by a server, which is the last rank
    n_push: int = 1  # downpour: steps between two pushes to the server, which is the last rank
    n_fetch: int = 1  # downpour
    adagrad: bool = False  # downpour: the server's step
    probability: float = 0.5  # gossip, gosgd: p, to meet or push after a step
    schedule: str = "fixed"  # or a torch scheduler as "torch.optim.lr_scheduler:StepLR"
    args: dict[str, Any] = field(default_factory=dict)  # of a torch optimizer
    schedule_args: dict[str, Any] = field(default_factory=dict)  # of a torch scheduler
    clip_norm: float = 0.0  # clip the gradient's norm to this; 0: do not
    debug: bool = False  # find parameters changed through .data, at the cost of a checksum


@dataclass(frozen=True)
class Circumstances:
    """What an algorithm must know of its run.

    Attributes:
        steps_per_epoch, seed: of the run.
        samples: of this agent.
        server: where `needs_server`.
    """

    steps_per_epoch: int
    samples: int
    seed: int
    server: Server | None


def needs_server(config: OptimConfig) -> bool:
    """Whether the algorithm needs a rank for a server beside the agents. Local."""
    return config.name == "downpour" or (config.name in _ELASTIC and config.asynchronous)


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
        UserError: for an unknown name or arguments that the optimizer does not take; arguments
            are the same on all ranks, so it is raised on all.
    """
    _check_settings(config)
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
    gossip = {"probability": config.probability, "seed": circumstances.seed}
    rounds = config.rounds
    if config.name == "icdsgd" and rounds == 1:
        rounds = 2
        if agents.rank == 0:
            log.info("icdsgd: 2 mixing rounds in a step; optim.rounds sets another number")
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "cdsgd": (CDSGD, {"rounds": rounds}),
        "icdsgd": (CDSGD, {"rounds": rounds}),
        "cdmsgd": (CDMSGD, {"rounds": rounds, **momentum}),
        "sgd": (SGD, {}),
        "msgd": (MSGD, momentum),
        "fedavg": (
            FedAvg,
            {
                "period": config.local_epochs * circumstances.steps_per_epoch,
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
    made: AgentOptimizer = kind(parameters, **own, **arguments, **common)
    return made


def _check_settings(config: OptimConfig) -> None:
    is_torch = ":" in config.name
    if not is_torch and config.name not in NAMES:
        near = difflib.get_close_matches(config.name, NAMES, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f'unknown optim.name "{config.name}": {hint}known are {", ".join(NAMES)} and any torch '
            'optimizer as "torch.optim:AdamW"'
        )
    defaults = OptimConfig()
    for key, names in _ONLY_OF.items():
        value = getattr(config, key)
        if value != getattr(defaults, key) and config.name not in names:
            raise UserError(f"optim.{key} = {value} is for {' and '.join(names)} only")
    if config.args and not is_torch:
        raise UserError(
            f'optim.args is for torch optimizers ("torch.optim:AdamW"), not {config.name}'
        )
    if config.local_epochs < 1:
        raise UserError(f"optim.local_epochs (E) must be at least 1, got {config.local_epochs}")
    if config.name in _ELASTIC and not 0 <= config.elasticity < 1:
        raise UserError(
            f"optim.elasticity (e) must be in (0, 1), or 0 for 0.9 / agents, "
            f"got {config.elasticity}"
        )


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


def make_scheduler(
    config: OptimConfig, optimizer: AgentOptimizer, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule that ``config`` names, to be stepped after every step. Local.

    Raises:
        UserError: for an unknown schedule or arguments that it does not take.
    """
    if ":" not in config.schedule or config.schedule.partition(":")[0] in schedule.NAMES:
        factor = schedule.parse(config.schedule, total_steps)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    kind = plugins.load_function(config.schedule, "optim.schedule")
    try:
        made = kind(optimizer, **config.schedule_args)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"optim.schedule = {config.schedule} with optim.schedule_args: {error}"
        ) from None
    if not isinstance(made, torch.optim.lr_scheduler.LRScheduler):
        raise UserError(f"optim.schedule = {config.schedule} is not a torch lr scheduler")
    return made


def restore_schedule(
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    optimizer: AgentOptimizer,
    saved: dict[str, Any],
    groups: list[dict[str, Any]] | None,
) -> None:
    """Go on with a schedule from its ``saved`` state. Local.

    Args:
        saved: ``scheduler.state_dict()`` of then, through JSON.
        groups: the parameter groups' hyperparameters of then; None where ``[optim]`` has changed
            since: then those of now hold, under the schedule at the step of then.

    Raises:
        UserError: if ``[optim]`` has changed and the scheduler is torch's, whose step sizes depend
            on those before.
    """
    if groups is not None:
        scheduler.load_state_dict(saved)
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)
        return
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        raise UserError(
            "[optim] was changed since the checkpoint, which a torch scheduler cannot follow: "
            "change it back, or use one of this program's schedules"
        )
    scheduler.last_epoch = int(saved["last_epoch"])
    scheduler._step_count = int(saved["_step_count"])
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    for group, base, factor in zip(
        optimizer.param_groups, scheduler.base_lrs, factors, strict=True
    ):
        group["lr"] = base * factor
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]

"""An optimizer and its step size schedule from a run's config."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from mpicdsgd import plugins, schedule
from mpicdsgd.agents import Agents
from mpicdsgd.algorithms.cdmsgd import CDMSGD
from mpicdsgd.algorithms.cdsgd import CDSGD
from mpicdsgd.algorithms.mixed import Mixed
from mpicdsgd.errors import UserError
from mpicdsgd.exchange import ExchangeConfig
from mpicdsgd.optim import AgentOptimizer

NAMES = ("cdsgd", "cdmsgd")


@dataclass(frozen=True)
class OptimConfig:
    """Section ``[optim]`` of a run's config."""

    name: str = "cdmsgd"  # cdsgd, or any torch optimizer as "torch.optim:AdamW"
    lr: float = 0.01
    momentum: float = 0.95
    nesterov: bool | str = True  # false: Polyak; "look-ahead"
    weight_decay: float = 0.0
    rounds: int = 1  # mixing rounds per step, tau
    schedule: str = "fixed"  # or a torch scheduler as "torch.optim.lr_scheduler:StepLR"
    args: dict[str, Any] = field(default_factory=dict)  # of a torch optimizer
    schedule_args: dict[str, Any] = field(default_factory=dict)  # of a torch scheduler
    clip_norm: float = 0.0  # clip the gradient's norm to this; 0: do not
    debug: bool = False  # find parameters changed through .data, at the cost of a checksum


def make_optimizer(
    config: OptimConfig,
    parameters: Iterable[torch.Tensor],
    agents: Agents,
    exchange: ExchangeConfig,
    buffers: Iterable[torch.Tensor] = (),
) -> AgentOptimizer:
    """The optimizer that ``config`` names. Collective over ``agents``.

    Raises:
        UserError: for an unknown name or arguments that the optimizer does not take; arguments
            are the same on all ranks, so it is raised on all.
    """
    common: dict[str, Any] = {
        "agents": agents, "buffers": buffers, "exchange": exchange, "debug": config.debug,
    }  # fmt: skip
    own: dict[str, Any] = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "rounds": config.rounds,
    }
    if ":" in config.name:
        if config.rounds != 1:
            raise UserError(f"optim.rounds = {config.rounds} is for {' and '.join(NAMES)} only")
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
    if config.args:
        raise UserError(
            f'optim.args is for torch optimizers ("torch.optim:AdamW"), not {config.name}'
        )
    if config.name == "cdsgd":
        return CDSGD(parameters, **own, **common)
    if config.name == "cdmsgd":
        return CDMSGD(
            parameters,
            momentum=config.momentum,
            nesterov=config.nesterov,  # type: ignore[arg-type]
            **own,
            **common,
        )
    near = difflib.get_close_matches(config.name, NAMES, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f'unknown optim.name "{config.name}": {hint}known are {", ".join(NAMES)} and any torch '
        'optimizer as "torch.optim:AdamW"'
    )


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

"""A torch scheduler for the schedule that a config names, and going on with it."""

from __future__ import annotations

from typing import Any

import torch

from mpicdsgd.algorithms import schedules
from mpicdsgd.algorithms.config import OptimConfig
from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.common import plugins
from mpicdsgd.common.errors import UserError


def make_scheduler(
    config: OptimConfig, optimizer: torch.optim.Optimizer, total_steps: int, shift: int = 0
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule that ``config`` names, to be stepped after every step. Local.

    Args:
        total_steps: of the whole run.
        shift: of its `runs.epochs.Course`.

    Raises:
        UserError: for an unknown schedule or arguments that it does not take.
    """
    if ":" not in config.schedule or config.schedule.partition(":")[0] in schedules.NAMES:
        factor = schedules.parse(config.schedule, total_steps, shift)
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

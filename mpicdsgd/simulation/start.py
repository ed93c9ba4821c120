"""What a simulation needs before its first step: a run's data, models and memory, of N agents."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mpicdsgd.algorithms.config import OptimConfig, is_torch, kind_of, settings_of
from mpicdsgd.algorithms.contract import GRADIENTS, Algorithm, Circumstances
from mpicdsgd.algorithms.factory import torch_optimizer
from mpicdsgd.algorithms.opening import check_admitted
from mpicdsgd.algorithms.registry import algorithms
from mpicdsgd.algorithms.torch_schedulers import make_scheduler
from mpicdsgd.algorithms.walk import check_declared
from mpicdsgd.comm.exchange.transport import WIRE_DTYPE
from mpicdsgd.common.errors import UserError
from mpicdsgd.data import Samples, load_everyone
from mpicdsgd.graphs.mixing_cycle import Mixing
from mpicdsgd.graphs.specs import graph_from_spec, mixing_from_spec
from mpicdsgd.kernels.arena import Arena
from mpicdsgd.kernels.coefficients import Coefficients
from mpicdsgd.models import build as models
from mpicdsgd.models import losses
from mpicdsgd.models.evaluate import evaluate
from mpicdsgd.runs.config import Config, check
from mpicdsgd.runs.rng import seed_generators
from mpicdsgd.simulation.minibatches import Together
from mpicdsgd.simulation.rows import Rows
from mpicdsgd.simulation.sequential import OneByOne
from mpicdsgd.simulation.torch_steps import TorchSteps
from mpicdsgd.simulation.vmap_trial import Loss, Trial, try_out
from mpicdsgd.simulation.vmapped import ManyAtATime

log = logging.getLogger("mpicdsgd")


class Hyperparameters(torch.optim.Optimizer):
    """The one parameter group of an algorithm, as a torch scheduler takes it; it moves nothing."""

    def __init__(self, defaults: dict[str, Any]) -> None:
        super().__init__([nn.Parameter(torch.zeros(()))], defaults)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Let schedulers see that a step was made."""

    @property
    def group(self) -> dict[str, Any]:
        return self.param_groups[0]


@dataclass(frozen=True)
class Start:
    """See `prepare`.

    Attributes:
        model: for the averaged model; its parameters are in ``layout``.
        coefficients: of a parameter group, as the algorithm's optimizer makes them.
        population: how the agents' gradients are computed.
        why_one_by_one: "" where they are computed many at a time.
        torch_steps: where a torch optimizer is the local step.
    """

    mixing: Mixing
    test: Samples
    together: Together
    model: nn.Module
    loss_fn: Loss
    layout: Arena
    stack: Rows
    population: ManyAtATime | OneByOne
    hyperparameters: Hyperparameters
    coefficients: Callable[[dict[str, Any]], Coefficients]
    why_one_by_one: str
    torch_steps: TorchSteps | None

    def scheduler(self, config: OptimConfig, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of ``config`` over a run of so many steps."""
        return make_scheduler(config, self.hyperparameters, steps)


def prepare(config: Config, agents: int, one_by_one: bool) -> Start:
    """Data, models and memory of ``agents`` agents as `runs.run.Run` would have them. Local.

    Args:
        one_by_one: compute gradients agent by agent, whatever the model.

    Raises:
        UserError: for anything wrong with the config, or what is not simulated.
    """
    graph = graph_from_spec(config.agents.topology, agents)
    mixing = mixing_from_spec(config.agents.mixing, graph)
    check(config)
    _check(config, mixing)
    for remark in (*graph.remarks, *mixing.remarks):
        log.warning("%s", remark)
    if config.agents.threads >= 1 or not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(config.agents.threads or len(os.sched_getaffinity(0)))

    # Whoever loads ahead, and how many, changes no batch: here nobody does.
    data = dataclasses.replace(config.data, workers=0)
    everyone = load_everyone(data, config.run.seed, agents)
    together = Together(everyone, data.batch_size, config.run.seed, data.drop_last)
    loss_fn = losses.loss_function(config.model)

    def build(j: int) -> nn.Module:
        local = config.agents.init == "local"
        seed_generators(config.run.seed, j + 1 if local else 0)
        return models.build(config.model, everyone.input_shape, everyone.classes)

    model = build(0)
    few = np.arange(min(2, len(everyone.test)))
    evaluate(model, everyone.test, loss_fn, len(few), few)
    algorithm, hyperparameters = _algorithm(config, together, agents)
    mixed = _mixed(model, config.model.buffers)
    layout, flat = _memory(config, model, build, mixed, agents)
    stack = _stack(config, layout, flat, mixing, algorithm)
    torch_steps = None
    if is_torch(config.optim):
        torch_steps = TorchSteps(layout, flat, lambda own: torch_optimizer(config.optim, own))
    trial = Trial("the command line asks for it")
    if not one_by_one:
        few_agents = range(min(2, agents))
        trial = try_out(model, loss_fn, layout, flat, together.minibatches(0, 0, few_agents))
    # Where gradients are averaged it is the mean's norm that is clipped.
    clip_norm = 0.0 if algorithm.over == GRADIENTS else config.optim.clip_norm
    population: ManyAtATime | OneByOne
    if trial.why_not:
        log.info("the agents' gradients are computed one by one: %s", trial.why_not)
        models_N = _models(config, model, build, agents)
        seed = config.run.seed
        population = OneByOne(models_N, model, loss_fn, stack, mixed, clip_norm, seed)
    else:
        population = ManyAtATime(model, loss_fn, layout, stack, clip_norm, trial)
    return Start(
        mixing, everyone.test, together, model, loss_fn, layout, stack, population,
        hyperparameters, algorithm.settings.coefficients, trial.why_not, torch_steps,
    )  # fmt: skip


def _memory(
    config: Config,
    model: nn.Module,
    build: Callable[[int], nn.Module],
    mixed: frozenset[str],
    agents: int,
) -> tuple[Arena, torch.Tensor]:
    """The layout of a row, and what the agents begin with, shape (N, D)."""
    own = [buffer for name, buffer in model.named_buffers() if name in mixed]
    layout = Arena(list(model.parameters()), own)
    flat = layout.flat.repeat(agents, 1)
    if config.agents.init == "local":
        for j in range(1, agents):
            _copy(build(j), mixed, layout.views_of(flat[j]))
    return layout, flat


def _stack(
    config: Config, layout: Arena, flat: torch.Tensor, mixing: Mixing, algorithm: Algorithm
) -> Rows:
    """The agents' memory, and the verbs over it."""
    return Rows(
        layout,
        flat,
        mixing,
        algorithm,
        wire=config.exchange.wire,
        messages=config.exchange.transport == "neighbor",
        measuring=config.run.theory,
        clip_norm=config.optim.clip_norm,
        is_ordered=config.exchange.sums == "ordered",
        has_moved=is_torch(config.optim),
    )


def _models(
    config: Config, model: nn.Module, build: Callable[[int], nn.Module], agents: int
) -> list[nn.Module]:
    """A model for each agent, where they go one by one."""
    of_agents = [build(j) for j in range(agents)]
    if config.agents.init == "broadcast":
        for other in of_agents:
            other.load_state_dict(model.state_dict())
    return of_agents


def _algorithm(
    config: Config, together: Together, agents: int
) -> tuple[Algorithm, Hyperparameters]:
    """The algorithm as a job would have it, and its parameter group."""
    settings = settings_of(config.optim)
    run = Circumstances(
        together.steps_per_epoch, np.array(together.shares), config.run.seed, agents
    )
    algorithm = kind_of(config.optim)(settings, run)
    defaults = {
        f.name: getattr(settings, f.name)
        for f in dataclasses.fields(settings)
        if f.metadata.get("per_group")
    }
    algorithm.check(agents)
    check_declared(algorithm)
    settings.coefficients(defaults)
    return algorithm, Hyperparameters(defaults)


def _check(config: Config, mixing: Mixing) -> None:
    kind = kind_of(config.optim)
    if not kind.synchronous:
        known = [name for name, other in algorithms().items() if other.synchronous]
        raise UserError(
            f'optim.name = "{config.optim.name}" is not simulated, as its agents go each at its '
            f"own pace: simulate runs {', '.join(known)} and torch optimizers, and train all others"
        )
    check_admitted(kind, config.optim.name, mixing)
    if config.exchange.wire not in WIRE_DTYPE:
        raise UserError(
            f'exchange.wire must be one of {", ".join(WIRE_DTYPE)}, got "{config.exchange.wire}"'
        )
    if config.agents.device not in ("auto", "cpu"):
        raise UserError(
            f'agents.device = "{config.agents.device}": simulate computes on the CPU; '
            'use "auto" or "cpu"'
        )
    run_dir = Path(config.run.dir)
    if (run_dir / "checkpoints").exists():
        raise UserError(
            f"{run_dir} holds checkpoints of a run, whose metrics a simulation would hide: set "
            "run.dir to another folder"
        )


def _mixed(model: nn.Module, buffers: str) -> frozenset[str]:
    """Names of the buffers that are mixed as the parameters are."""
    if buffers != "mixed":
        return frozenset()
    return frozenset(name for name, b in model.named_buffers() if b.dtype == torch.float32)


@torch.no_grad()
def _copy(model: nn.Module, mixed: frozenset[str], views: list[torch.Tensor]) -> None:
    own = [buffer for name, buffer in model.named_buffers() if name in mixed]
    for tensor, view in zip([*model.parameters(), *own], views, strict=True):
        view.copy_(tensor)

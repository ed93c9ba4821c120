"""Centralised SGD and its momentum form: one model, the gradient averaged over all agents.

    SGD          x <- x - alpha h,          h = 1/N sum_j g_j(x) + lambda x
    MSGD         v <- mu v - alpha h
      Polyak     x <- x + v
      Nesterov   x <- x + mu v - alpha h

The baseline of the paper's section 5. All agents hold the same x and do the same to it; v contains
the step size, as everywhere here. Statistics of BatchNorm stay each agent's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.algorithms.gradient_average import MeanGradients
from mpicdsgd.algorithms.hyperparameters import seconds
from mpicdsgd.algorithms.local_steps import check_nesterov, plain, with_momentum
from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.opening import ExchangeConfig
from mpicdsgd.kernels.arena import Coefficients


class SGD(AgentOptimizer):
    """Centralised SGD as a torch optimizer. Collective over ``agents``, whose graph is not used.

    Gradients are averaged during `backward`, which is collective, too: all agents call it equally
    often and on the same parameters, as with DistributedDataParallel. All begin with agent 0's
    parameters. `mix` is a step to which this agent's gradient adds nothing.

    Args:
        params: parameters or groups of them, as for `torch.optim.SGD`.
        lr: step size alpha, >= 0.
        weight_decay: lambda >= 0.
        agents, buffers, exchange, debug: see `mpicdsgd.algorithms.optimizer.AgentOptimizer`.
    """

    exchange: MeanGradients

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        *,
        agents: Agents,
        buffers: Iterable[torch.Tensor] = (),
        exchange: ExchangeConfig | None = None,
        debug: bool = False,
        **more: Any,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, **more}
        super().__init__(params, defaults, agents, buffers=buffers, exchange=exchange, debug=debug)

    def open_exchange(self) -> tuple[MeanGradients, list[NDArray[np.float32]]]:
        with self.agents.agreement("the exchange's settings"):
            timeout_s = seconds(type(self).__name__, self._config, self.agents)
        return MeanGradients(self.agents, self.arena, timeout_s), [np.empty(0, np.float32)]

    def coefficients(self, group: dict[str, Any]) -> Coefficients:
        return plain(group)

    def use_gradients(self, scale: torch.Tensor | None, overflow: torch.Tensor | None) -> None:
        self.exchange.complete()

    @torch.no_grad()
    def mix(self) -> None:
        """A step to which this agent adds no gradient. Collective, as `step`."""
        self._begin()
        self.zero_grad(set_to_none=True)
        self.exchange.complete()
        self.arena.fill_segments(list(self._coefficients_per_tensor()))
        self.stepper.advance(self.arena.segments)

    def _progress(self, parameter: torch.Tensor) -> None:
        self.exchange.ready(parameter)


class MSGD(SGD):
    """Centralised SGD with momentum. See `SGD`.

    Args:
        momentum: mu in [0, 1).
        nesterov: False for Polyak.
    """

    has_momentum = True

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool | Literal["look-ahead"] = True,
        weight_decay: float = 0.0,
        *,
        agents: Agents,
        buffers: Iterable[torch.Tensor] = (),
        exchange: ExchangeConfig | None = None,
        debug: bool = False,
    ) -> None:
        with agents.agreement("MSGD()"):
            check_nesterov(nesterov)
        self.look_ahead = nesterov == "look-ahead"
        self._nesterov = nesterov is True
        super().__init__(
            params,
            lr,
            weight_decay,
            agents=agents,
            buffers=buffers,
            exchange=exchange,
            debug=debug,
            momentum=momentum,
        )

    def coefficients(self, group: dict[str, Any]) -> Coefficients:
        return with_momentum(group, self._nesterov)

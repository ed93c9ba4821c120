"""Downpour SGD (Dean et al. 2012): a server, and agents that push and fetch at their own pace.

    every step           h = g_i(x_i) + lambda x_i,   x_i <- x_i - alpha h,   H_i <- H_i + h
    every n_push steps   the server does x <- x - alpha H_i, or Adagrad's step with H_i;   H_i <- 0
    every n_fetch steps  x_i <- x

See `links.rules` for the server's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.algorithms.hyperparameters import at_least_one, seconds
from mpicdsgd.algorithms.local_steps import plain
from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.algorithms.server.client import Downpour as Link
from mpicdsgd.algorithms.server.server import Server
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.opening import ExchangeConfig
from mpicdsgd.common.errors import UserError
from mpicdsgd.kernels.arena import Coefficients


class Downpour(AgentOptimizer):
    """Downpour SGD as a torch optimizer. Collective over ``agents``, whose graph is not used.

    All begin with agent 0's parameters, and so does the server. Its model is
    ``opt.exchange.centre()`` at `rest`.

    Args:
        params: parameters or groups of them, as for `torch.optim.SGD`.
        lr: step size alpha, >= 0; the server takes it as it is when an agent pushes.
        weight_decay: lambda >= 0.
        server: the job's.
        n_push, n_fetch: steps between pushes and between fetches, >= 1.
        adagrad: whether the server's step is Adagrad's (Duchi et al. 2011).
        agents, buffers, exchange, debug: see `mpicdsgd.algorithms.optimizer.AgentOptimizer`.
    """

    exchange: Link

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        *,
        agents: Agents,
        server: Server,
        n_push: int = 1,
        n_fetch: int = 1,
        adagrad: bool = False,
        buffers: Sequence[torch.Tensor] = (),
        exchange: ExchangeConfig | None = None,
        debug: bool = False,
    ) -> None:
        with agents.agreement("Downpour()"):
            at_least_one("n_push", n_push)
            at_least_one("n_fetch", n_fetch)
            if list(buffers):
                raise UserError(
                    "Downpour SGD exchanges gradients, which buffers do not have: with it, "
                    'model.buffers = "local"'
                )
        agents.require_same("Downpour's arguments", repr((n_push, n_fetch, adagrad)))
        self._server = server
        self._arguments: Any = {"push": n_push, "fetch": n_fetch, "adagrad": adagrad}
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(params, defaults, agents, buffers=buffers, exchange=exchange, debug=debug)

    def open_exchange(self) -> tuple[Link, list[NDArray[np.float32]]]:
        with self.agents.agreement("the exchange's settings"):
            timeout_s = seconds("Downpour", self._config, self.agents)
        link = Link(self.agents, self._server, self.arena, timeout_s, **self._arguments)
        return link, [np.empty(0, np.float32)]

    def coefficients(self, group: dict[str, Any]) -> Coefficients:
        return plain(group)

    def use_gradients(self, scale: torch.Tensor | None, overflow: torch.Tensor | None) -> None:
        if overflow is not None and float(overflow):
            return
        rows = list(self._coefficients_per_tensor())
        self.exchange.accrue(
            [row.alpha for row in rows],
            [row.decay for row in rows],
            1.0 if scale is None else float(scale),
        )

"""Elastic averaging SGD (Zhang, Choromanska, LeCun 2015), and its momentum form.

    EASGD      x_i <- x_i - alpha g_i(x_i) + e (c - x_i)
    EAMSGD     v_i <- mu v_i - alpha g_i(x_i + mu v_i)
               x_i <- x_i + v_i + e (c - x_i)

with a pull from the centre c in every tau-th step; synchronous (equations 5 and 6), where c is
pulled by all agents at once, or with a server, by one agent at a time (algorithms 1 and 2).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.algorithms.elastic_centre import Centre
from mpicdsgd.algorithms.hyperparameters import at_least_one, seconds
from mpicdsgd.algorithms.local_steps import plain, with_momentum
from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.algorithms.server.client import ServedCentre
from mpicdsgd.algorithms.server.server import Server
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.opening import ExchangeConfig
from mpicdsgd.common.errors import UserError
from mpicdsgd.kernels.arena import Coefficients


class EASGD(AgentOptimizer):
    """EASGD as a torch optimizer. Collective over ``agents``, whose graph is not used.

    The centre begins with agent 0's parameters; its model is ``opt.exchange.centre()``.

    Args:
        params: parameters or groups of them, as for `torch.optim.SGD`.
        lr: step size alpha, >= 0.
        weight_decay: lambda >= 0; the gradient becomes g + lambda x.
        period: tau >= 1.
        elasticity: e in (0, 1), at most 1 / N where synchronous; None: 0.9 / N.
        server: None: synchronous.
        agents, buffers, exchange, debug: see `mpicdsgd.algorithms.optimizer.AgentOptimizer`.
    """

    exchange: Centre | ServedCentre

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        *,
        agents: Agents,
        period: int = 4,
        elasticity: float | None = None,
        server: Server | None = None,
        buffers: Iterable[torch.Tensor] = (),
        exchange: ExchangeConfig | None = None,
        debug: bool = False,
        **more: Any,
    ) -> None:
        name = type(self).__name__
        e = 0.9 / agents.size if elasticity is None else elasticity
        with agents.agreement(f"{name}()"):
            at_least_one("period (tau)", period)
            if not 0 < e < 1:
                raise UserError(f"elasticity (e = alpha rho) must be in (0, 1), got {elasticity}")
            if server is None and e * agents.size > 1 + 1e-6:
                raise UserError(
                    f"elasticity (e = alpha rho) must be at most 1 / N = {1 / agents.size:g} where "
                    f"all {agents.size} agents pull at once, got {elasticity}"
                )
        agents.require_same(f"{name}'s arguments", repr((period, e, server is None)))
        self._period, self._elasticity, self._server = period, float(np.float32(e)), server
        defaults = {"lr": lr, "weight_decay": weight_decay, **more}
        super().__init__(params, defaults, agents, buffers=buffers, exchange=exchange, debug=debug)

    def open_exchange(self) -> tuple[Centre | ServedCentre, list[NDArray[np.float32]]]:
        agents, arena, server = self.agents, self.arena, self._server
        with agents.agreement("the exchange's settings"):
            timeout_s = seconds(type(self).__name__, self._config, self.agents)
        rest: Any = {"period": self._period, "elasticity": self._elasticity}
        link: Centre | ServedCentre = (
            Centre(agents, arena.size, timeout_s, **rest)
            if server is None
            else ServedCentre(agents, server, arena, timeout_s, **rest)
        )
        return link, [np.array([self._elasticity], np.float32)]

    def coefficients(self, group: dict[str, Any]) -> Coefficients:
        return plain(group)


class EAMSGD(EASGD):
    """EASGD with Nesterov's look-ahead momentum. See `EASGD`.

    The model holds x + mu v between steps, where the next gradient is taken: evaluate it under
    ``with opt.evaluating():``.

    Args:
        momentum: mu in [0, 1).
    """

    has_momentum = True
    look_ahead = True

    def __init__(
        self, params: Any, lr: float = 0.01, momentum: float = 0.95, *, agents: Agents, **more: Any
    ) -> None:
        super().__init__(params, lr, agents=agents, momentum=momentum, **more)

    def coefficients(self, group: dict[str, Any]) -> Coefficients:
        return with_momentum(group, nesterov=False)

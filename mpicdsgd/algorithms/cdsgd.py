"""CDSGD: consensus-based distributed SGD, and i-CDSGD.

    x_j <- sum_l Pi[j,l] x_l - alpha g_j(x_j)               eq. (5), Algorithm 1, arXiv 1706.07880

The gradient is taken at the old x_j, so it needs nothing from the exchange. With tau mixing rounds
per step it is i-CDSGD (arXiv 1805.12120): x <- Pi^tau x - alpha g(x).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from mpicdsgd.algorithms.local_steps import plain
from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.opening import ExchangeConfig
from mpicdsgd.kernels.arena import Coefficients


class CDSGD(AgentOptimizer):
    """Consensus-based distributed SGD as a torch optimizer. Collective over ``agents``.

    Args:
        params: parameters or groups of them, as for `torch.optim.SGD`.
        lr: step size alpha, >= 0.
        weight_decay: lambda >= 0; the gradient becomes g + lambda x.
        agents, rounds, buffers, exchange, debug: see `optimizer.AgentOptimizer`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        *,
        agents: Agents,
        rounds: int = 1,
        buffers: Iterable[torch.Tensor] = (),
        exchange: ExchangeConfig | None = None,
        debug: bool = False,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(
            params,
            defaults,
            agents,
            rounds=rounds,
            buffers=buffers,
            exchange=exchange,
            debug=debug,
        )

    def coefficients(self, group: dict[str, Any]) -> Coefficients:
        return plain(group)

"""CDMSGD: CDSGD with momentum, in three forms. Only x is mixed, never v.

    v_j <- mu v_j - alpha g_j(x_j)
    Polyak      x_j <- sum_l Pi[j,l] x_l + v_j
    Nesterov    x_j <- sum_l Pi[j,l] x_l + mu v_j - alpha g_j(x_j)

as the authors released them (Nesterov is Keras's and PyTorch's form, used in the paper's
experiments), and the textbook's look-ahead (Sutskever et al. 2013),

    v_j <- mu v_j - alpha g_j(x_j + mu v_j);     x_j <- sum_l Pi[j,l] x_l + v_j

v contains the step size, as in the paper: a schedule scales what comes into v from then on, not
what is already in it. (torch.optim.SGD multiplies the whole buffer by the present lr.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch

from mpicdsgd.algorithms.local_steps import check_nesterov, with_momentum
from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.opening import ExchangeConfig
from mpicdsgd.kernels.arena import Coefficients


class CDMSGD(AgentOptimizer):
    """Consensus-based distributed momentum SGD as a torch optimizer. Collective over ``agents``.

    Args:
        params: parameters or groups of them, as for `torch.optim.SGD`.
        lr: step size alpha, >= 0.
        momentum: mu in [0, 1).
        nesterov: True, False for Polyak, or "look-ahead": the model then holds x + mu v between
            steps, where the next gradient is taken; evaluate it under ``with opt.evaluating():``.
        weight_decay: lambda >= 0; the gradient becomes g + lambda x (with look-ahead, of the
            point where the gradient is taken).
        agents, rounds, buffers, exchange, debug: see `optimizer.AgentOptimizer`.
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
        rounds: int = 1,
        buffers: Iterable[torch.Tensor] = (),
        exchange: ExchangeConfig | None = None,
        debug: bool = False,
    ) -> None:
        with agents.agreement("CDMSGD()"):
            check_nesterov(nesterov)
        self.look_ahead = nesterov == "look-ahead"
        self._nesterov = nesterov is True
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
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
        return with_momentum(group, self._nesterov)

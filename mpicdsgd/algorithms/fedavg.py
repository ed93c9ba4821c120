"""FedAvg (McMahan et al. 2017): rounds of local SGD, then the average weighted by sample counts.

Every round a fraction C of the agents starts from the server's model s and makes ``period`` steps
of SGD (E local epochs); see `links.averaging` for what the server does. The paper has E = 1, C = 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.algorithms.hyperparameters import at_least_one, below_one, seconds
from mpicdsgd.algorithms.local_steps import plain
from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.algorithms.round_average import RoundAverage
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.opening import ExchangeConfig
from mpicdsgd.common.errors import UserError
from mpicdsgd.kernels.arena import Coefficients


class FedAvg(AgentOptimizer):
    """FedAvg as a torch optimizer. Collective over ``agents``, whose graph is not used.

    No rank is a server: the average is an Allreduce. All begin with agent 0's parameters, and the
    server's model is ``opt.exchange.centre()``. An agent that is not chosen in a round
    (`takes_part`) calls `mix` in the place of its steps.

    Args:
        params: parameters or groups of them, as for `torch.optim.SGD`.
        lr: step size alpha, >= 0.
        weight_decay: lambda >= 0; the gradient becomes g + lambda x.
        period: steps of a round, >= 1: E times those of an epoch.
        shift: a round ends where ``period`` divides step + shift.
        fraction: C in (0, 1]; at least one agent is chosen.
        samples: of this agent, its weight n_k; >= 1.
        server_momentum: beta in [0, 1).
        seed: of the choice of agents, the same on all.
        agents, buffers, exchange, debug: see `mpicdsgd.algorithms.optimizer.AgentOptimizer`.
    """

    exchange: RoundAverage

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        *,
        agents: Agents,
        period: int,
        fraction: float = 1.0,
        samples: int = 1,
        server_momentum: float = 0.0,
        seed: int = 0,
        shift: int = 0,
        buffers: Iterable[torch.Tensor] = (),
        exchange: ExchangeConfig | None = None,
        debug: bool = False,
    ) -> None:
        with agents.agreement("FedAvg()"):
            at_least_one("period", period)
            at_least_one("samples", samples)
            below_one("server_momentum", server_momentum)
            if not 0 < fraction <= 1:
                raise UserError(
                    f"fraction (C, of the agents that take part in a round) must be in (0, 1], "
                    f"got {fraction}"
                )
        agents.require_same(
            "FedAvg's arguments", repr((period, fraction, server_momentum, seed, shift))
        )
        self._link_arguments = {
            "period": period,
            "fraction": fraction,
            "samples": samples,
            "server_momentum": server_momentum,
            "seed": seed,
            "shift": shift,
        }
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(params, defaults, agents, buffers=buffers, exchange=exchange, debug=debug)

    def open_exchange(self) -> tuple[RoundAverage, list[NDArray[np.float32]]]:
        with self.agents.agreement("the exchange's settings"):
            timeout_s = seconds("FedAvg", self._config, self.agents)
        arguments: Any = self._link_arguments
        link = RoundAverage(self.agents, self.arena, timeout_s, **arguments)
        return link, [np.empty(0, np.float32)]

    def coefficients(self, group: dict[str, Any]) -> Coefficients:
        return plain(group)

    @property
    def takes_part(self) -> bool:
        return self.exchange.takes_part(self.steps)

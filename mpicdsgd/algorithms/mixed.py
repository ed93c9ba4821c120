"""Any torch optimizer, made decentralised: its own step, then the mixing.

    x_j <- step(x_j, g_j(x_j)) + sum_l Pi[j,l] (x_l - x_j)           all x on the right: before it

For `torch.optim.SGD` without momentum this is CDSGD. Only parameters are mixed; the optimizer's
own state (AdamW's moments, say) stays local.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mpicdsgd.algorithms.cdsgd import CDSGDSettings, Consensus
from mpicdsgd.algorithms.contract import Algorithm, Circumstances
from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.algorithms.torch_step import TorchStep
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.opening import ExchangeConfig


class Mixed(AgentOptimizer):
    """``optimizer``'s step as the local step of an algorithm. Collective over ``agents``.

    It shares ``optimizer``'s parameter groups, so schedulers and changes of lr act on both.

    Args:
        optimizer: a torch optimizer over float32 parameters; step only through `Mixed`.
        algorithm: whose step it is the local one of; None: CDSGD's, one mixing by the matrix.
        agents, buffers, exchange, debug: see `optimizer.AgentOptimizer`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        agents: Agents,
        *,
        algorithm: Algorithm | None = None,
        buffers: Iterable[torch.Tensor] = (),
        exchange: ExchangeConfig | None = None,
        debug: bool = False,
    ) -> None:
        self.optimizer = optimizer
        run = Circumstances(agents=agents.size)
        super().__init__(
            [{"params": group["params"]} for group in optimizer.param_groups],
            algorithm or Consensus(CDSGDSettings(), run),
            agents,
            torch_step=TorchStep(optimizer),
            buffers=buffers,
            exchange=exchange,
            debug=debug,
        )
        self.param_groups = optimizer.param_groups

"""Gossip SGD: after a local step an agent shares its parameters with one random neighbour.

`GossipSGD`: the two average (Boyd et al. 2006; Jin et al. 2016); see `links.pairs`. `GoSGD`: it
pushes them with half of its weight, and nobody waits (Blot et al. 2016); see `links.push`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.algorithms import hyperparameters
from mpicdsgd.algorithms.hyperparameters import seconds
from mpicdsgd.algorithms.local_steps import plain
from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.algorithms.pairs import Pairs
from mpicdsgd.algorithms.pushes import Pushes
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.opening import ExchangeConfig
from mpicdsgd.common.errors import UserError
from mpicdsgd.kernels.arena import Coefficients


class GossipSGD(AgentOptimizer):
    """Gossip SGD with pairwise averaging, as a torch optimizer. Collective over ``agents``.

    Args:
        params: parameters or groups of them, as for `torch.optim.SGD`.
        lr: step size alpha, >= 0.
        weight_decay: lambda >= 0; the gradient becomes g + lambda x.
        probability: p in [0, 1], with which an agent wakes after a step to meet a neighbour.
        seed: of the draws, the same on all agents.
        agents: with an undirected graph.
        buffers, exchange, debug: see `mpicdsgd.algorithms.optimizer.AgentOptimizer`.
    """

    exchange: Pairs | Pushes
    _link: type[Pairs] | type[Pushes] = Pairs

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        *,
        agents: Agents,
        probability: float = 0.5,
        seed: int = 0,
        buffers: Iterable[torch.Tensor] = (),
        exchange: ExchangeConfig | None = None,
        debug: bool = False,
    ) -> None:
        name = type(self).__name__
        with agents.agreement(f"{name}()"):
            hyperparameters.probability("probability (p)", probability)
            if self._link is Pairs and agents.graph.directed:
                raise UserError(
                    "GossipSGD averages in pairs, which need an undirected graph: use another "
                    'topology, or optim.name = "gosgd"'
                )
        agents.require_same(f"{name}'s arguments", repr((probability, seed)))
        self._arguments: Any = {"probability": probability, "seed": seed}
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(params, defaults, agents, buffers=buffers, exchange=exchange, debug=debug)

    def open_exchange(self) -> tuple[Pairs | Pushes, list[NDArray[np.float32]]]:
        with self.agents.agreement("the exchange's settings"):
            timeout_s = seconds(type(self).__name__, self._config, self.agents)
        self.agents.remark(self.agents.graph.remarks)
        link = self._link(self.agents, self.arena.size, timeout_s, **self._arguments)
        return link, [np.empty(0, np.float32)]

    def coefficients(self, group: dict[str, Any]) -> Coefficients:
        return plain(group)


class GoSGD(GossipSGD):
    """Gossip SGD with weighted pushes, each agent at its own pace. See `GossipSGD`.

    The graph may be directed: a push goes to an agent that reads this one. ``exchange.weight`` is
    the agent's; at `rest` the agents' add up to 1. Call `rest` before collective calls of your own:
    while an agent waits there it reads no mail, and others may wait for that.

    Args:
        probability: p in [0, 1], of a push after a step.
    """

    _link = Pushes

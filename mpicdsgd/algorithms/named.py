"""The optimizers for scripts by their names; `any_algorithm.optimizer` makes one of any algorithm.

An algorithm's settings and its step are in its own file; here they get the arguments that a script
gives. All are `optimizer.AgentOptimizer`, whose arguments ``params, agents, buffers, exchange,
debug`` they share, and collective over ``agents``.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from mpicdsgd.algorithms import cdmsgd, cdsgd, downpour, easgd, fedavg, gosgd, gossip, registry, sgd
from mpicdsgd.algorithms.contract import Algorithm, Circumstances
from mpicdsgd.algorithms.hyperparameters import at_least_one
from mpicdsgd.algorithms.local_steps import Momentum, Plain
from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.algorithms.server.server import Server
from mpicdsgd.comm.agents import Agents
from mpicdsgd.common.errors import UserError


class CDSGD(AgentOptimizer):
    """Consensus-based distributed SGD, arXiv 1706.07880 eq. (5); see `cdsgd`.

    Args:
        params: parameters or groups of them, as for `torch.optim.SGD`.
        lr: step size alpha, >= 0.
        weight_decay: lambda >= 0; the gradient becomes g + lambda x.
        rounds: mixing rounds tau per step (i-CDSGD, arXiv 1805.12120).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        *,
        agents: Agents,
        rounds: int = 1,
        **common: Any,
    ) -> None:
        settings = cdsgd.CDSGDSettings(lr, weight_decay, rounds)
        super().__init__(params, cdsgd.Consensus(settings, _run(agents)), agents, **common)


class CDMSGD(AgentOptimizer):
    """Consensus-based distributed momentum SGD, arXiv 1706.07880; see `cdmsgd`.

    Args:
        momentum: mu in [0, 1).
        nesterov: True, False for Polyak, or "look-ahead": the model then holds x + mu v between
            steps, where the next gradient is taken; evaluate it under ``with opt.evaluating():``.
        params, lr, weight_decay, rounds: as of `CDSGD`; with look-ahead, weight decay acts at the
            point where the gradient is taken.
    """

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
        **common: Any,
    ) -> None:
        settings = cdmsgd.CDMSGDSettings(lr, weight_decay, momentum, nesterov, rounds)
        made = cdmsgd.MomentumConsensus(settings, _run(agents))
        super().__init__(params, made, agents, **common)


class SGD(AgentOptimizer):
    """Centralised SGD: gradients are averaged during `backward`, which is collective; see `sgd`.

    Args:
        params, lr, weight_decay: as of `CDSGD`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        *,
        agents: Agents,
        **common: Any,
    ) -> None:
        made = sgd.MeanGradient(Plain(lr, weight_decay), _run(agents))
        super().__init__(params, made, agents, **common)


class MSGD(AgentOptimizer):
    """Centralised SGD with momentum; see `sgd`.

    Args:
        params, lr, momentum, nesterov, weight_decay: as of `CDMSGD`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool | Literal["look-ahead"] = True,
        weight_decay: float = 0.0,
        *,
        agents: Agents,
        **common: Any,
    ) -> None:
        settings = Momentum(lr, weight_decay, momentum, nesterov)
        made = sgd.MeanGradientMomentum(settings, _run(agents))
        super().__init__(params, made, agents, **common)


class FedAvg(AgentOptimizer):
    """FedAvg (McMahan et al. 2017); see `fedavg`. The server's model is ``opt.centre()``.

    An agent that is not chosen in a round (`takes_part`) calls `mix` in the place of its steps.

    Args:
        params, lr, weight_decay: as of `CDSGD`.
        period: steps of a round, >= 1: E times those of an epoch.
        fraction: C in (0, 1]; at least one agent is chosen.
        samples: of this agent, its weight n_k; >= 1.
        server_momentum: beta in [0, 1).
        seed: of the choice of agents, the same on all.
        shift: a round ends where ``period`` divides step + shift.
    """

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
        **common: Any,
    ) -> None:
        with agents.agreement("FedAvg()"):
            at_least_one("period", period)
            at_least_one("samples", samples)
        settings = fedavg.FedAvgSettings(lr, weight_decay, 1, fraction, server_momentum)
        run = Circumstances(period, np.array([samples]), seed, agents.size, shift)
        super().__init__(params, fedavg.FederatedAverage(settings, run), agents, **common)


class EASGD(AgentOptimizer):
    """Elastic averaging SGD; see `easgd`. The centre's model is ``opt.centre()``.

    Args:
        params, lr, weight_decay: as of `CDSGD`.
        period: tau >= 1.
        elasticity: e in (0, 1), at most 1 / N where synchronous; None: 0.9 / N.
        server: None: synchronous.
    """

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
        **common: Any,
    ) -> None:
        e = _elasticity("EASGD", agents, elasticity)
        settings = easgd.EASGDSettings(lr, weight_decay, period, e, server is not None)
        made = _kind_of("easgd", settings)(settings, _run(agents))
        super().__init__(params, made, agents, server=server, **common)


class EAMSGD(AgentOptimizer):
    """EASGD with look-ahead momentum; see `easgd`.

    The model holds x + mu v between steps, where the next gradient is taken: evaluate it under
    ``with opt.evaluating():``.

    Args:
        momentum: mu in [0, 1).
        params, lr, weight_decay, period, elasticity, server: as of `EASGD`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0.95,
        *,
        agents: Agents,
        weight_decay: float = 0.0,
        period: int = 4,
        elasticity: float | None = None,
        server: Server | None = None,
        **common: Any,
    ) -> None:
        e = _elasticity("EAMSGD", agents, elasticity)
        settings = easgd.EAMSGDSettings(
            lr, weight_decay, momentum,
            period=period, elasticity=e, asynchronous=server is not None,
        )  # fmt: skip
        made = _kind_of("eamsgd", settings)(settings, _run(agents))
        super().__init__(params, made, agents, server=server, **common)


class Downpour(AgentOptimizer):
    """Downpour SGD; see `downpour`. The server's model is ``opt.centre()`` at `rest`.

    Args:
        params, lr, weight_decay: as of `CDSGD`.
        server: the job's.
        n_push, n_fetch: steps between pushes and between fetches, >= 1.
        adagrad: whether the server's step is Adagrad's (Duchi et al. 2011).
    """

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
        **common: Any,
    ) -> None:
        settings = downpour.DownpourSettings(lr, weight_decay, n_push, n_fetch, adagrad)
        made = downpour.ServedDownpour(settings, _run(agents))
        super().__init__(params, made, agents, server=server, **common)


class GossipSGD(AgentOptimizer):
    """Gossip SGD with pairwise averaging, on an undirected graph; see `gossip`.

    Args:
        params, lr, weight_decay: as of `CDSGD`.
        probability: p in [0, 1], with which an agent wakes after a step to meet a neighbour.
        seed: of the draws, the same on all agents.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        *,
        agents: Agents,
        probability: float = 0.5,
        seed: int = 0,
        **common: Any,
    ) -> None:
        settings = gossip.GossipSettings(lr, weight_decay, probability)
        made = gossip.PairwiseGossip(settings, _run(agents, seed))
        super().__init__(params, made, agents, **common)


class GoSGD(AgentOptimizer):
    """Gossip SGD with weighted pushes, each agent at its own pace; see `gosgd`.

    The graph may be directed: a push goes to an agent that reads this one. ``opt.weight`` is the
    agent's; at `rest` the agents' add up to 1. Call `rest` before collective calls of your own:
    while an agent waits there it reads no mail, and others may wait for that.

    Args:
        probability: p in [0, 1], of a push after a step.
        params, lr, weight_decay, seed: as of `GossipSGD`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        *,
        agents: Agents,
        probability: float = 0.5,
        seed: int = 0,
        **common: Any,
    ) -> None:
        settings = gossip.GossipSettings(lr, weight_decay, probability)
        made = gosgd.WeightedPushes(settings, _run(agents, seed))
        super().__init__(params, made, agents, **common)

    @property
    def weight(self) -> float:
        """w of this agent."""
        return float(self.context.number("gossip/weight")[0])


def _kind_of(name: str, settings: Any) -> type[Algorithm]:
    return registry.algorithms()[name].of(settings)


def _run(agents: Agents, seed: int = 0) -> Circumstances:
    return Circumstances(agents=agents.size, seed=seed)


def _elasticity(name: str, agents: Agents, given: float | None) -> float:
    """e as the settings have it: 0 for 0.9 / N. Raises UserError, on every rank, as agreed."""
    with agents.agreement(f"{name}()"):
        if given is not None and not 0 < given < 1:
            raise UserError(f"elasticity (e = alpha rho) must be in (0, 1), got {given}")
    return given or 0.0

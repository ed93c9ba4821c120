"""Decentralised training of PyTorch models over MPI: CDSGD, CDMSGD and their kin on a graph.

The names below are loaded when they are first used, so that what needs no MPI (graphs, plots,
spawned worker processes) does not start it.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

import mpicdsgd.comm.mpich_under_slurm  # noqa: F401 - before anything starts MPI
from mpicdsgd.common.old_names import MOVED, OldNames

if TYPE_CHECKING:
    from mpicdsgd.algorithms.any_algorithm import optimizer as optimizer
    from mpicdsgd.algorithms.mixed import Mixed as Mixed
    from mpicdsgd.algorithms.named import CDMSGD as CDMSGD
    from mpicdsgd.algorithms.named import CDSGD as CDSGD
    from mpicdsgd.algorithms.named import EAMSGD as EAMSGD
    from mpicdsgd.algorithms.named import EASGD as EASGD
    from mpicdsgd.algorithms.named import MSGD as MSGD
    from mpicdsgd.algorithms.named import SGD as SGD
    from mpicdsgd.algorithms.named import Downpour as Downpour
    from mpicdsgd.algorithms.named import FedAvg as FedAvg
    from mpicdsgd.algorithms.named import GoSGD as GoSGD
    from mpicdsgd.algorithms.named import GossipSGD as GossipSGD
    from mpicdsgd.algorithms.optimizer import AgentOptimizer as AgentOptimizer
    from mpicdsgd.algorithms.server.server import Server as Server
    from mpicdsgd.comm.agents import Agents as Agents
    from mpicdsgd.comm.exchange.errors import AgentFault as AgentFault
    from mpicdsgd.comm.exchange.errors import AgentLeft as AgentLeft
    from mpicdsgd.comm.exchange.errors import AgentMissing as AgentMissing
    from mpicdsgd.comm.exchange.errors import ExchangeError as ExchangeError
    from mpicdsgd.comm.exchange.errors import OutOfStep as OutOfStep
    from mpicdsgd.comm.exchange.opening import ExchangeConfig as ExchangeConfig
    from mpicdsgd.common.errors import UserError as UserError
    from mpicdsgd.graphs.fastest_mixing import fastest as fastest
    from mpicdsgd.graphs.graph import Graph as Graph
    from mpicdsgd.graphs.mixing_cycle import MixingCycle as MixingCycle
    from mpicdsgd.graphs.mixing_cycle import alternating_matchings as alternating_matchings
    from mpicdsgd.graphs.mixing_cycle import mixing_cycle as mixing_cycle
    from mpicdsgd.graphs.mixing_cycle import one_peer_exponential as one_peer_exponential
    from mpicdsgd.graphs.mixing_matrix import MixingMatrix as MixingMatrix
    from mpicdsgd.graphs.mixing_rules import from_matrix as from_matrix
    from mpicdsgd.graphs.mixing_rules import lazy as lazy
    from mpicdsgd.graphs.mixing_rules import max_degree as max_degree
    from mpicdsgd.graphs.mixing_rules import metropolis as metropolis
    from mpicdsgd.graphs.mixing_rules import uniform as uniform
    from mpicdsgd.graphs.specs import graph_from_spec as graph_from_spec
    from mpicdsgd.graphs.specs import mixing_from_spec as mixing_from_spec
    from mpicdsgd.graphs.topologies import chain as chain
    from mpicdsgd.graphs.topologies import complete as complete
    from mpicdsgd.graphs.topologies import erdos_renyi as erdos_renyi
    from mpicdsgd.graphs.topologies import exponential as exponential
    from mpicdsgd.graphs.topologies import grid as grid
    from mpicdsgd.graphs.topologies import hypercube as hypercube
    from mpicdsgd.graphs.topologies import random_regular as random_regular
    from mpicdsgd.graphs.topologies import ring as ring
    from mpicdsgd.graphs.topologies import star as star
    from mpicdsgd.graphs.topologies import torus as torus
    from mpicdsgd.graphs.topologies import watts_strogatz as watts_strogatz

__version__ = "0.1.0.dev0"

_HOMES = {
    "algorithms.any_algorithm": ["optimizer"],
    "algorithms.mixed": ["Mixed"],
    "algorithms.named": [
        "CDMSGD",
        "CDSGD",
        "EAMSGD",
        "EASGD",
        "MSGD",
        "SGD",
        "Downpour",
        "FedAvg",
        "GoSGD",
        "GossipSGD",
    ],
    "algorithms.optimizer": ["AgentOptimizer"],
    "algorithms.server.server": ["Server"],
    "comm.agents": ["Agents"],
    "comm.exchange.errors": [
        "AgentFault",
        "AgentLeft",
        "AgentMissing",
        "ExchangeError",
        "OutOfStep",
    ],
    "comm.exchange.opening": ["ExchangeConfig"],
    "common.errors": ["UserError"],
    "graphs.fastest_mixing": ["fastest"],
    "graphs.graph": ["Graph"],
    "graphs.mixing_cycle": [
        "MixingCycle",
        "alternating_matchings",
        "mixing_cycle",
        "one_peer_exponential",
    ],
    "graphs.mixing_matrix": ["MixingMatrix"],
    "graphs.mixing_rules": ["from_matrix", "lazy", "max_degree", "metropolis", "uniform"],
    "graphs.specs": ["graph_from_spec", "mixing_from_spec"],
    "graphs.topologies": [
        "chain",
        "complete",
        "erdos_renyi",
        "exponential",
        "grid",
        "hypercube",
        "random_regular",
        "ring",
        "star",
        "torus",
        "watts_strogatz",
    ],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if f"{__name__}.{name}" in MOVED:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'mpicdsgd' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mpicdsgd.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.meta_path.append(OldNames())

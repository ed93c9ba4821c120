"""Decentralised training of PyTorch models over MPI: CDSGD, CDMSGD and their kin on a graph.

The names below are loaded when they are first used, so that what needs no MPI (graphs, plots,
spawned worker processes) does not start it.
"""

import importlib
from typing import TYPE_CHECKING, Any

import mpicdsgd.network  # noqa: F401 - before anything starts MPI

if TYPE_CHECKING:
    from mpicdsgd.agents import Agents as Agents
    from mpicdsgd.algorithms import CDMSGD as CDMSGD
    from mpicdsgd.algorithms import CDSGD as CDSGD
    from mpicdsgd.algorithms import EAMSGD as EAMSGD
    from mpicdsgd.algorithms import EASGD as EASGD
    from mpicdsgd.algorithms import MSGD as MSGD
    from mpicdsgd.algorithms import SGD as SGD
    from mpicdsgd.algorithms import Downpour as Downpour
    from mpicdsgd.algorithms import FedAvg as FedAvg
    from mpicdsgd.algorithms import GoSGD as GoSGD
    from mpicdsgd.algorithms import GossipSGD as GossipSGD
    from mpicdsgd.algorithms import Mixed as Mixed
    from mpicdsgd.cycle import MixingCycle as MixingCycle
    from mpicdsgd.cycle import alternating_matchings as alternating_matchings
    from mpicdsgd.cycle import mixing_cycle as mixing_cycle
    from mpicdsgd.cycle import one_peer_exponential as one_peer_exponential
    from mpicdsgd.errors import UserError as UserError
    from mpicdsgd.exchange import AgentFault as AgentFault
    from mpicdsgd.exchange import AgentLeft as AgentLeft
    from mpicdsgd.exchange import AgentMissing as AgentMissing
    from mpicdsgd.exchange import ExchangeConfig as ExchangeConfig
    from mpicdsgd.exchange import ExchangeError as ExchangeError
    from mpicdsgd.exchange import OutOfStep as OutOfStep
    from mpicdsgd.fastestmixing import fastest as fastest
    from mpicdsgd.links.server import Server as Server
    from mpicdsgd.mixing import MixingMatrix as MixingMatrix
    from mpicdsgd.mixing import from_matrix as from_matrix
    from mpicdsgd.mixing import lazy as lazy
    from mpicdsgd.mixing import max_degree as max_degree
    from mpicdsgd.mixing import metropolis as metropolis
    from mpicdsgd.mixing import uniform as uniform
    from mpicdsgd.specs import graph_from_spec as graph_from_spec
    from mpicdsgd.specs import mixing_from_spec as mixing_from_spec
    from mpicdsgd.topology import Graph as Graph
    from mpicdsgd.topology import chain as chain
    from mpicdsgd.topology import complete as complete
    from mpicdsgd.topology import erdos_renyi as erdos_renyi
    from mpicdsgd.topology import exponential as exponential
    from mpicdsgd.topology import grid as grid
    from mpicdsgd.topology import hypercube as hypercube
    from mpicdsgd.topology import random_regular as random_regular
    from mpicdsgd.topology import ring as ring
    from mpicdsgd.topology import star as star
    from mpicdsgd.topology import torus as torus
    from mpicdsgd.topology import watts_strogatz as watts_strogatz

__version__ = "0.1.0.dev0"

_HOMES = {
    "agents": ["Agents"],
    "algorithms": [
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
        "Mixed",
    ],
    "cycle": ["MixingCycle", "alternating_matchings", "mixing_cycle", "one_peer_exponential"],
    "errors": ["UserError"],
    "exchange": [
        "AgentFault",
        "AgentLeft",
        "AgentMissing",
        "ExchangeConfig",
        "ExchangeError",
        "OutOfStep",
    ],
    "fastestmixing": ["fastest"],
    "links.server": ["Server"],
    "mixing": ["MixingMatrix", "from_matrix", "lazy", "max_degree", "metropolis", "uniform"],
    "specs": ["graph_from_spec", "mixing_from_spec"],
    "topology": [
        "Graph",
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
    if name not in _HOME:
        raise AttributeError(f"module 'mpicdsgd' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mpicdsgd.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

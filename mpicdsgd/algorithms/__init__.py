"""The algorithms, one file each: what is computed and published, and when."""

from mpicdsgd.algorithms.cdmsgd import CDMSGD
from mpicdsgd.algorithms.cdsgd import CDSGD
from mpicdsgd.algorithms.downpour import Downpour
from mpicdsgd.algorithms.easgd import EAMSGD, EASGD
from mpicdsgd.algorithms.fedavg import FedAvg
from mpicdsgd.algorithms.gossip import GoSGD, GossipSGD
from mpicdsgd.algorithms.mixed import Mixed
from mpicdsgd.algorithms.sgd import MSGD, SGD

__all__ = [
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
]

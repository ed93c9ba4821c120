"""The algorithms, and the torch optimizers that run them over MPI.

May import `models` and what is below. Begin with `cdsgd` (the paper's equation 5) and `contract`
(what an algorithm declares), then `context` (the verbs of a step in a job) and `optimizer`.
`registry` has the list. What an algorithm of one's own needs can be imported from here.
"""

from mpicdsgd.algorithms.contract import Admits, Algorithm, Circumstances, Context, setting
from mpicdsgd.algorithms.local_steps import Momentum, Plain
from mpicdsgd.algorithms.registry import algorithm

__all__ = [
    "Admits",
    "Algorithm",
    "Circumstances",
    "Context",
    "Momentum",
    "Plain",
    "algorithm",
    "setting",
]

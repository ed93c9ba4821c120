"""The algorithms, one file each: what is computed and published, and when."""

from mpicdsgd.algorithms.cdmsgd import CDMSGD
from mpicdsgd.algorithms.cdsgd import CDSGD
from mpicdsgd.algorithms.mixed import Mixed

__all__ = ["CDMSGD", "CDSGD", "Mixed"]

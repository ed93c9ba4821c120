"""Readers, partitions and the order of samples."""

from mpicdsgd.data.loading import Data, DataConfig, Everyone, load, load_everyone
from mpicdsgd.data.partition import partition
from mpicdsgd.data.samples import Samples
from mpicdsgd.data.shuffle import Shuffler

__all__ = [
    "Data",
    "DataConfig",
    "Everyone",
    "Samples",
    "Shuffler",
    "load",
    "load_everyone",
    "partition",
]

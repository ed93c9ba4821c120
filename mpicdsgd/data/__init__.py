"""Readers, partitions and the order of samples."""

from mpicdsgd.data.loading import Data, DataConfig, load
from mpicdsgd.data.partition import partition
from mpicdsgd.data.samples import Samples
from mpicdsgd.data.shuffle import Shuffler

__all__ = ["Data", "DataConfig", "Samples", "Shuffler", "load", "partition"]

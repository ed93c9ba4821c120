"""scikit-learn's handwritten digits: 1,797 real ones, 8 x 8, that come with the package."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.common.errors import UserError
from mpicdsgd.data.source import Source, from_arrays

TRAIN = 1437  # of 1,797: four fifths
FILE = "datasets/data/digits.csv.gz"  # in scikit-learn


def digits() -> Source:
    """Return the source: 1,437 training and 360 test images (1, 8, 8), pixels / 16.

    The split is one fixed permutation, whatever the run's seed, so results can be compared.

    Raises:
        UserError: scikit-learn is not installed.
    """
    table = _table()
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(table))
    images = table[order, :-1].astype(np.uint8).reshape(-1, 1, 8, 8)
    labels = table[order, -1].astype(np.int64)
    return from_arrays(
        (images[:TRAIN], labels[:TRAIN]), (images[TRAIN:], labels[TRAIN:]), 10, (), (16.0,)
    )


def _table() -> NDArray[Any]:
    """A row for each digit: 64 pixels, 0 to 16, and its label.

    Read from the file itself, where it is: scikit-learn takes longer to import than torch does.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise UserError('data.name = "digits" needs scikit-learn: pip install "mpicdsgd[demo]"')
    path = Path(package.submodule_search_locations[0], FILE)
    if path.is_file():
        return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])

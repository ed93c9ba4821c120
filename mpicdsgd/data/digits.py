"""scikit-learn's handwritten digits: 1,797 real ones, 8 x 8, that come with the package."""

import numpy as np

from mpicdsgd.data.source import Source, from_arrays
from mpicdsgd.errors import UserError

TRAIN = 1437  # of 1,797: four fifths


def digits() -> Source:
    """Return the source: 1,437 training and 360 test images (1, 8, 8), pixels / 16.

    The split is one fixed permutation, whatever the run's seed, so results can be compared.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as err:
        raise UserError(
            'data.name = "digits" needs scikit-learn: pip install "mpicdsgd[demo]"'
        ) from err
    bunch = load_digits()
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(bunch.target))
    images = bunch.images.astype(np.uint8)[order, None]
    labels = bunch.target.astype(np.int64)[order]
    return from_arrays(
        (images[:TRAIN], labels[:TRAIN]), (images[TRAIN:], labels[TRAIN:]), 10, (), (16.0,)
    )

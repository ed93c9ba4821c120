"""What an algorithm of one's own may get wrong: it is refused by name, before anything is mixed.

`tests/mpi/algorithms/test_contract.py` has the same in jobs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from wrong_steps import RIGHT, WRONG, WRONG_DECLARATIONS, SmallRows, made, own

from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs.mixing_cycle import Mixing
from mpicdsgd.graphs.specs import graph_from_spec, mixing_from_spec
from mpicdsgd.simulation.exact import ExactRows

N = 4


def mixing() -> Mixing:
    return mixing_from_spec("metropolis", graph_from_spec("ring", N))


def simulated(kind: Any, in_float64: bool) -> Any:
    algorithm = made(kind, N, lr=0.1)
    start = np.random.default_rng(0).standard_normal((N, 3)).astype(np.float32)
    where: Any = ExactRows if in_float64 else SmallRows
    return where(start, mixing(), algorithm, lambda k, X: X)


@pytest.mark.parametrize("in_float64", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_verbs_in_a_wrong_order(name: str, in_float64: bool) -> None:
    body, text = WRONG[name]
    with pytest.raises(RuntimeError, match=text):
        simulated(own(**body), in_float64).run(3)


@pytest.mark.parametrize("name", WRONG_DECLARATIONS)
def test_what_cannot_be_declared(name: str) -> None:
    body, text = WRONG_DECLARATIONS[name]
    with pytest.raises(UserError, match=text):
        simulated(own(**body), True)


@pytest.mark.parametrize("in_float64", [True, False])
@pytest.mark.parametrize("name", RIGHT)
def test_what_looks_odd_and_is_right(name: str, in_float64: bool) -> None:
    body, formula = RIGHT[name]
    start = np.random.default_rng(0).standard_normal((N, 3)).astype(np.float32)
    expected = formula(mixing().turns[0].Pi, start.astype(float), 0.1, 5, lambda k, X: X)
    found = simulated(own(**body), in_float64).run(5)
    np.testing.assert_allclose(found, expected, atol=1e-13 if in_float64 else 1e-6)

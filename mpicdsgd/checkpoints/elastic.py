"""Going on with another number of agents: where each agent's state comes from.

Of N0 agents before and N now, the first min(N, N0) keep their own state. A newcomer takes the mix
that the new matrix would make of its neighbours' states; where none of them has one yet, it waits
for a neighbour that takes one so. All this is linear, so one matrix says it:

    W[j, l]   the weight of old agent l's state in new agent j's; shape (N, N0), rows sum to 1
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.graphs.mixing_cycle import Mixing

Arrays = dict[str, NDArray[np.generic]]


def origins(mixing: Mixing, before: int) -> NDArray[np.float64]:
    """W, float64, shape (N, ``before``). Local, the same on all ranks.

    Args:
        mixing: of the N agents now; of a cycle the mean over its turns is taken.
        before: N0 >= 1.
    """
    n = mixing.graph.n
    Pi = np.mean([turn.Pi for turn in mixing.turns], axis=0)
    near = mixing.graph.adjacency()
    # A file's matrix may have weights < 0, the fastest one 0 on an edge: these mix no states.
    weights = np.where(near & (Pi > 0), Pi, 0.0)
    W = np.eye(n, before)
    placed = np.arange(n) < before
    while not placed.all():
        reached = np.zeros(n, np.bool_)
        for j in np.flatnonzero(~placed):
            row = np.where(placed, weights[j], 0.0)
            if not row.any():
                row = np.where(placed, near[j], 0.0)
            if row.any():
                W[j] = row / row.sum() @ W
                reached[j] = True
        assert reached.any(), "a graph of agents is connected"
        placed |= reached
    return W


def mixed(parts: Iterable[tuple[float, Arrays]]) -> Arrays:
    """The states in ``parts``, mixed by their weights, which sum to 1. Local.

    Floating-point arrays are summed in float64 and rounded once; others (counters) are those of the
    heaviest part, of the first one among equals. An array that some parts lack is left as the
    heaviest has it.
    """
    sums: dict[str, NDArray[np.float64]] = {}
    counted: dict[str, float] = {}
    heaviest, most = Arrays(), -1.0
    for weight, arrays in parts:
        if weight == 1.0:
            return arrays
        if weight > most:
            heaviest, most = arrays, weight
        for name, array in arrays.items():
            if array.dtype.kind != "f":
                continue
            part = weight * array.astype(np.float64)
            same = name in sums and sums[name].shape == part.shape
            sums[name] = sums[name] + part if same else part
            counted[name] = (counted[name] if same else 0.0) + weight
    return {
        name: sums[name].astype(array.dtype)
        if name in sums and sums[name].shape == array.shape and abs(counted[name] - 1) < 1e-9
        else array
        for name, array in heaviest.items()
    }

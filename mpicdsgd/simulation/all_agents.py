"""The verbs of `contract.Context` that are the same for all agents in one process, however kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.algorithms.contract import Algorithm
from mpicdsgd.algorithms.walk import Walk
from mpicdsgd.graphs.mixing_cycle import Mixing

_ALONE = "asynchronous algorithms are not simulated"


class AllAgents:
    """See the module. All methods are local.

    Args:
        like: (N, D), as the algorithm's vectors are to be.

    Attributes:
        steps: steps completed.
    """

    server: Any = None

    def __init__(self, like: torch.Tensor, mixing: Mixing, algorithm: Algorithm) -> None:
        n = mixing.graph.n
        assert len(like) == n, "a row for each agent"
        self.algorithm, self._mixing = algorithm, mixing
        self.ranks, self.size, self.parameters_end = np.arange(n), n, like.shape[1]
        self.neighbours, self.readers = mixing.graph.sources, mixing.graph.destinations
        names = [*algorithm.vectors, *(["mixed"] if algorithm.posts > 1 else [])]
        self._own = {name: torch.zeros_like(like) for name in names}
        self._numbers = {name: np.full(n, value) for name, value in algorithm.numbers.items()}
        self._walk = Walk(algorithm, n, len(mixing.turns))
        self.steps = 0

    @property
    def x(self) -> torch.Tensor:
        """The agents' parameters, shape (N, D)."""
        raise NotImplementedError

    @property
    def step(self) -> int:
        return self.steps

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == "x":
            return self.x
        return self._own[name] if name in self._own else self._walk.unknown(name)

    def number(self, name: str) -> NDArray[np.float64]:
        return self._numbers[name] if name in self._numbers else self._walk.unknown(name)

    def everyones(self, values: NDArray[Any]) -> NDArray[np.float64]:
        self._walk.require_no_graph("everyones()")
        return np.asarray(values, np.float64)

    def broadcast(self, values: torch.Tensor) -> None:
        self._walk.require_no_graph("broadcast()")
        values.copy_(values[0].clone())

    def require_alike(self, name: str, what: str) -> None:
        """Nothing more: all rows had the same operations."""
        self._walk.require_no_graph("require_alike()")
        self[name]  # or it says that there is none

    def met(self, partners: NDArray[np.int64]) -> NDArray[np.int64]:
        """Whom each agent swaps with: itself where there is nobody."""
        met = np.where(partners >= 0, partners, self.ranks)
        if (met[met] != self.ranks).any():
            self._walk.refuse(f"swap() needs pairs, each with the other, got {partners.tolist()}")
        return met

    def add_gradient(self, into: str) -> None:
        raise NotImplementedError(_ALONE)

    def step_sizes(self) -> list[float]:
        raise NotImplementedError(_ALONE)

    def read_mail(self) -> None:
        raise NotImplementedError(_ALONE)

    def wait_for_mail_room(self) -> None:
        raise NotImplementedError(_ALONE)

    def send_mail(self, to: int, weight: float) -> None:
        raise NotImplementedError(_ALONE)

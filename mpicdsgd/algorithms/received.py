"""What has come from the neighbours of this process's agents, and the weights to mix it by."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.graphs.mixing_cycle import Mixing


class Received:
    """See the module; a step has it from `Context.received`. Each list has an entry for each agent.

    Args:
        near: the neighbours' published buffers, in agent order.
        weights, exact: Pi's weights of them, float32 and float64, shape (degree,).
        own: Pi[j, j].
        names: of the numbers that were published beside.
        sent: the agent's own; beside: the neighbours', in the order of ``near``.
        serial: how many publications were received before it.
    """

    __slots__ = ("beside", "exact", "names", "near", "own", "sent", "serial", "weights")

    def __init__(
        self,
        near: list[list[Any]],
        weights: list[NDArray[np.float32]],
        own: list[float],
        exact: list[NDArray[np.float64]],
        names: tuple[str, ...],
        sent: list[tuple[float, ...]],
        beside: list[list[tuple[float, ...]]],
        serial: int,
    ) -> None:
        self.near, self.weights, self.own, self.exact = near, weights, own, exact
        self.names, self.sent, self.beside, self.serial = names, sent, beside, serial

    def mixed(self, name: str) -> NDArray[np.float64]:
        """sum_l Pi[j,l] s_l of the number ``name``, shape (n,)."""
        k = self._index(name)
        total = np.empty(len(self.near))
        for j, (own, exact) in enumerate(zip(self.own, self.exact, strict=True)):
            total[j] = own * self.sent[j][k]
            for weight, numbers in zip(exact, self.beside[j], strict=True):
                total[j] += weight * numbers[k]
        return total

    def reweighted(self, name: str, total: NDArray[np.float64]) -> Received:
        """The same with weights Pi[j,l] s_l / total_j, s the number ``name``."""
        k = self._index(name)
        exact = [
            weights * np.array([numbers[k] for numbers in beside]) / total[j]
            for j, (weights, beside) in enumerate(zip(self.exact, self.beside, strict=True))
        ]
        own = [own * self.sent[j][k] / total[j] for j, own in enumerate(self.own)]
        rounded = [weights.astype(np.float32) for weights in exact]
        return Received(
            self.near, rounded, own, exact, self.names, self.sent, self.beside, self.serial
        )

    def _index(self, name: str) -> int:
        if name not in self.names:
            published = ", ".join(self.names) or "none"
            raise RuntimeError(f"no number {name} was published beside, but {published}")
        return self.names.index(name)


def weights_of(
    mixing: Mixing, rank: int
) -> list[tuple[float, NDArray[np.float32], NDArray[np.float64]]]:
    """Of each turn: the agent's own weight, and its neighbours' in float32 and in float64."""
    rows = [turn.row(rank) for turn in mixing.turns]
    return [(own, np.array(near, np.float32), np.array(near)) for own, _, near in rows]

"""The exact twin of a simulation: the same `Algorithm.step` on float64 rows.

    N    agents
    D    parameters of one agent
    X, V, Y    float64 (N, D): x, momentum, and the points where gradients are taken

No kernel, no rounding on a wire, no padding: to compare a recursion with its formula, and runs with
what they should be. It computes what `rows.Rows` does, each pass for all agents at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.algorithms.contract import GRADIENTS, PAIRS, SUMS, Algorithm
from mpicdsgd.algorithms.received import Received
from mpicdsgd.algorithms.walk import check_declared
from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs.mixing_cycle import Mixing
from mpicdsgd.simulation.all_agents import AllAgents

Array = NDArray[np.float64]
Gradient = Callable[[int, Array], Array]


class ExactRows(AllAgents):
    """See the module and `contract.Context`, whose vectors are float64 here. All is local.

    Args:
        X0: what the agents begin with, shape (N, D).
        mixing: for N agents.
        gradient: G of step k at Y, both of shape (N, D).
        group: hyperparameters in the place of the settings' own, to be changed between steps.

    Attributes:
        steps: steps completed.
        x, v, y: float64 tensors (N, D): v is None without momentum, y is x without look-ahead.

    Raises:
        UserError: for an asynchronous algorithm, or settings out of range.
    """

    def __init__(
        self,
        X0: Array,
        mixing: Mixing,
        algorithm: Algorithm,
        gradient: Gradient,
        *,
        group: Mapping[str, Any] | None = None,
    ) -> None:
        if not algorithm.synchronous:
            raise UserError(f"{algorithm.name} is asynchronous: it is not simulated")
        X = torch.tensor(X0, dtype=torch.float64)
        algorithm.check(len(X))
        check_declared(algorithm)
        super().__init__(X, mixing, algorithm)
        local = algorithm.settings
        self.gradient = gradient
        self.group = dataclasses.asdict(local) | dict(group or {})
        self._x, self.v = X, torch.zeros_like(X) if local.has_momentum else None
        self.y = X.clone() if local.has_momentum and local.look_ahead else X
        self._written: dict[int, torch.Tensor] = {}
        self._shown: dict[int, torch.Tensor] = {}
        self._sent: list[tuple[float, ...]] = []
        self._sum = X
        self._is_begun = False

    @property
    def x(self) -> torch.Tensor:
        return self._x

    def run(self, steps: int) -> Array:
        """Make so many steps. Returns X."""
        self._begin()
        for _ in range(steps):
            self._step()
        return self.x.numpy().copy()

    def _begin(self) -> None:
        if self._is_begun:
            return
        self._is_begun = True
        self._walk.begin()
        self.algorithm.begin(self, True)
        self._end()

    def _step(self) -> None:
        self.coefficients = self.algorithm.settings.coefficients(self.group)
        at = self.y.numpy().copy()
        G = np.array(self.gradient(self.steps, at), np.float64)
        if self.algorithm.over == GRADIENTS:
            G[:] = G.mean(axis=0)
        here = [self.algorithm.takes_part(self.steps, j) for j in range(self.size)]
        everybody = np.array(here) | (self.algorithm.over == GRADIENTS)
        self._takes_part = torch.from_numpy(everybody)[:, None]
        self._h = torch.from_numpy(G + self.coefficients.decay * at)
        self._walk.begin_step()
        self.algorithm.step(self)
        self._walk.end_step()
        self.steps += 1
        self._end()

    def _end(self) -> None:
        if self.v is not None and self.y is not self.x:
            mu = self.coefficients.mu if self.steps else 0.0
            self.y.copy_(self.x + mu * self.v)
        if self._walk.is_to_post:
            self._post()

    def _post(self) -> None:
        self._walk.posts(self.steps)
        self._shown = self._written
        self._beside = self._sent

    # The verbs.

    def column(self, numbers: Array) -> torch.Tensor:
        return torch.from_numpy(np.asarray(numbers, np.float64)).view(-1, 1)

    def publish(self, **numbers: Array) -> None:
        self._sent = self._walk.publishes(numbers)
        sends = self.algorithm.sends
        fresh = {self._walk.slots[name]: name for name in sends if self._walk.is_fresh(name)}
        self._written = {
            slot: self._written[slot] if slot in fresh else self[name].clone()
            for slot, name in enumerate(sends)
        }

    def received(self) -> Received:
        if self._walk.is_to_post:
            self._post()
        serial, Pi = self._walk.receives(), self._mixing.turns[self._walk.turn].Pi
        near = [np.flatnonzero(row) for row in Pi - np.diag(np.diag(Pi))]
        weights = [Pi[j, sources] for j, sources in enumerate(near)]
        beside = [[self._beside[i] for i in sources] for sources in near]
        return Received(
            [list(sources) for sources in near], [w.astype(np.float32) for w in weights],
            np.diag(Pi).tolist(), weights, self._walk.names, self._beside, beside, serial,
        )  # fmt: skip

    def update(
        self,
        out: str = "x",
        *,
        start: str = "",
        mix: Received | torch.Tensor | None = None,
        weight: float | Array = 1.0,
        gradient: bool | str = False,
        factor: Array | float = 1.0,
        publish: bool = True,
        moved: bool = False,
        of: str = "",
    ) -> None:
        begun = self[start or out]
        mixed = begun.clone()
        if isinstance(mix, Received):
            shown = self._shown[self._walk.source(out, start, of, mix)]
            own = shown if moved or of else begun
            W = torch.zeros(self.size, self.size, dtype=torch.float64)
            for j, (sources, weights) in enumerate(zip(mix.near, mix.exact, strict=True)):
                W[j, sources] = torch.from_numpy(weights)
            mixed += self._each(weight) * (W @ shown - W.sum(dim=1, keepdim=True) * own)
        elif mix is not None:
            mixed += self._each(weight) * (mix - begun)
        if gradient is True:
            mixed += self._local_step(self._each(factor))
        elif isinstance(gradient, str):
            mixed -= self._each(factor) * self.coefficients.alpha * self[gradient]
        self[out].copy_(mixed)
        slot = self._walk.slots.get(out, -1)
        if slot >= 0:
            if publish:
                self._written = {**self._written, slot: mixed}
            self._walk.wrote(slot, self[out] if publish else None)

    def take_gradient(self, into: str) -> None:
        self._walk.uses_gradient()
        self[into].copy_(torch.where(self._takes_part, self._h, self[into]))

    def replace(self, values: torch.Tensor) -> None:
        self.x.copy_(values)

    def start_sum(self, values: torch.Tensor) -> None:
        self._walk.require(SUMS, "start_sum()")
        self._walk.sums(begins=True)
        self._sum = values.sum(dim=0)

    def summed(self) -> torch.Tensor:
        self._walk.require(SUMS, "summed()")
        self._walk.sums(begins=False)
        return self._sum.repeat(self.size, 1)

    def swap(self, partners: NDArray[np.int64]) -> torch.Tensor:
        self._walk.require(PAIRS, "swap()")
        return self.x[torch.from_numpy(self.met(partners))]

    # What the verbs are made of.

    def _each(self, values: Array | float) -> torch.Tensor:
        return self.column(np.broadcast_to(np.asarray(values, np.float64), (self.size,)).copy())

    def _local_step(self, factor: torch.Tensor) -> torch.Tensor:
        """What the gradient adds to x."""
        self._walk.uses_gradient()
        c = self.coefficients
        step = factor * c.alpha * self._h
        push = -c.c_g * step
        if self.v is not None:
            self.v.copy_(torch.where(self._takes_part, c.mu * self.v - step, self.v))
            push += c.c_v * self.v
        return torch.where(self._takes_part, push, torch.zeros_like(push))

"""A step of all agents in one process: the verbs of `contract.Context` over rows.

Row j of each array is laid out as agent j's `arena.Arena` is, and each pass over it is the call
that agent j's `context.AgentContext` makes in a job of N ranks, with the same arguments: the same
bits. The algorithm's step is the same text in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.algorithms.contract import GRADIENTS, GRAPH, PAIRS, SUMS, Algorithm
from mpicdsgd.algorithms.received import Received
from mpicdsgd.algorithms.walk import per_agent
from mpicdsgd.graphs.mixing_cycle import Mixing
from mpicdsgd.kernels import native
from mpicdsgd.kernels.arena import Arena
from mpicdsgd.kernels.coefficients import Coefficients
from mpicdsgd.simulation import traffic
from mpicdsgd.simulation.gradients import Held, Part
from mpicdsgd.simulation.row_memory import RowMemory

_NONE = np.zeros(0, np.float32)


class Rows(RowMemory):
    """See the module. All methods are local.

    `begin` once, then `advance` for each step. Attributes: see `RowMemory`.

    Args:
        layout: an arena of one agent's parameters (and mixed buffers).
        flat: float32, shape (N, D), what the agents begin with; it becomes `flat`.
        mixing: for N agents.
        wire: what is published: float32, bfloat16, float16.
        messages: count the bytes as where header and values go in one message.
        measuring: keep what a step measures.
        clip_norm: of the mean gradient, where gradients are averaged.
        is_ordered: count the bytes of sums as in agent order, see `comm.links.allreduce.Sum`.
        has_moved: whether a torch optimizer makes the local step: x has changed before the pass.
    """

    def __init__(
        self,
        layout: Arena,
        flat: torch.Tensor,
        mixing: Mixing,
        algorithm: Algorithm,
        *,
        wire: str = "float32",
        messages: bool = False,
        measuring: bool = False,
        clip_norm: float = 0.0,
        is_ordered: bool = False,
        has_moved: bool = False,
    ) -> None:
        super().__init__(layout, flat, mixing, algorithm, wire, messages, measuring, is_ordered)
        self._clip_norm, self._has_moved = clip_norm, has_moved
        self._is_at_x = self._has_local = False
        self._sum: torch.Tensor | None = None
        self._ones = np.ones(self.size, np.float32)
        self.coefficients: Coefficients | None = None

    # The walk of a step.

    def begin(self) -> None:
        """Before the first step: agents begin as they are."""
        self._take_buffers()
        self._walk.begin()
        self._parts: Iterable[Part] = ()
        self._was_written(is_y_too=True)
        self.algorithm.begin(self, True)
        self._follow()
        if self._walk.is_to_post:
            self._post()

    def advance(
        self,
        parts: Iterable[Part],
        coefficients: Coefficients,
        seen: Callable[[Part], None] = lambda part: None,
    ) -> None:
        """Make the algorithm's step, and show what is to be shown for the next.

        Args:
            parts: some agents' gradients at a time, computed at `flat` when they are asked for;
                agents that are in none make their step without one.
            coefficients: of the local step, on all agents.
            seen: called with each part before it is used.
        """
        self._parts, self.coefficients, self._seen = parts, coefficients, seen
        self._is_at_x = self._has_local = False
        self._plain["mu"][: len(self._layout.parameters)] = coefficients.mu
        self.finite[:], self.disagreement[:] = True, 0.0
        self._take_buffers()
        if self.algorithm.over == GRADIENTS:
            self._average_gradients()
        self._walk.begin_step()
        self.algorithm.step(self)
        self._walk.end_step()
        if not self._walk.is_gradient_used:
            for part in self._parts:
                self._seen(part)
        self._follow()
        self.steps += 1
        if self._walk.is_to_post:
            self._post()

    # The verbs: see `contract.Context`.

    def column(self, numbers: NDArray[np.float64]) -> torch.Tensor:
        return torch.from_numpy(np.asarray(numbers, np.float32)).view(-1, 1)

    def publish(self, **numbers: NDArray[np.float64]) -> None:
        self._sent = self._walk.publishes(numbers)
        for name in self.algorithm.sends:
            if not self._walk.is_fresh(name):
                self.update(name)

    def received(self) -> Received:
        if self._walk.is_to_post:
            self._post()
        serial = self._walk.receives()
        own, near, weights, exact = self._weights[self._walk.turn]
        read, sent, names = self._read, self._beside, self._walk.names
        return Received(
            [[read[0][source] for source in sources] for sources in near],
            weights, own, exact, names, sent,
            [[sent[source] for source in sources] for sources in near] if names else [],
            serial,
        )  # fmt: skip

    def update(
        self,
        out: str = "x",
        *,
        start: str = "",
        mix: Received | torch.Tensor | None = None,
        weight: float | NDArray[np.float64] = 1.0,
        gradient: bool | str = False,
        factor: NDArray[np.float64] | float = 1.0,
        publish: bool = True,
        moved: bool = False,
        of: str = "",
    ) -> None:
        if gradient is True:
            self._walk.uses_gradient()
        elif out == "x":
            self._hold_gradients()  # they are of the parameters as they are now
        a = _Arguments(
            out, start or out, self._walk.slots.get(out, -1), mix, self._ones, publish,
            moved or bool(of),
        )  # fmt: skip
        for name in (a.out, a.start, *([gradient] if isinstance(gradient, str) else [])):
            self[name]  # or it says that there is none
        if isinstance(mix, Received):
            a.source = self._walk.source(out, start, of, mix)
        elif mix is None:
            a.source = a.slot
        a.weight, a.factor = per_agent(weight, self.size), per_agent(factor, self.size)
        a.is_first = a.source == 0 and isinstance(mix, Received) and not self._is_at_x
        if gradient is True:
            self._local_step(a)
        else:
            for j in range(self.size):
                segments = self._plain
                if isinstance(gradient, str):
                    segments = self._pointing_at(gradient, j)
                elif mix is not None and not isinstance(mix, Received) and not a.weight[j]:
                    continue
                self._pass(a, j, segments)
        self._is_at_x = self._is_at_x or a.is_first
        if a.slot >= 0:
            can = publish and not self._walk.is_under_way
            self._walk.wrote(a.slot, self[out] if can else None)
        if out == "x" and (mix is not None or gradient is not False or start not in ("", "x")):
            self._was_written(is_y_too=gradient is True)

    def take_gradient(self, into: str) -> None:
        self._walk.uses_gradient()
        self[into]  # or it says that there is none
        a = _Arguments("x", "x", -1, None, self._ones)
        a.v = self._rows[into]
        for j, segments in self._gradients():
            segments = segments.copy()
            segments["alpha"], segments["own"] = -1.0, 0  # v <- 0 v + h, and x + 0 v is x
            segments["mu"] = segments["c_v"] = segments["c_g"] = 0.0
            self._pass(a, j, segments)
        self._was_written()

    def replace(self, values: torch.Tensor) -> None:
        self._hold_gradients()
        self.x.copy_(values)
        self._was_written()

    def start_sum(self, values: torch.Tensor) -> None:
        self._walk.require(SUMS, "start_sum()")
        self._walk.sums(begins=True)
        total = values[0].clone()
        for row in values[1:]:
            total += row
        self._sum = total
        self.bytes_sent += traffic.of_sum(4 * total.numel(), self.size, self._is_ordered)

    def summed(self) -> torch.Tensor:
        self._walk.require(SUMS, "summed()")
        self._walk.sums(begins=False)
        assert self._sum is not None
        return self._sum.repeat(self.size, 1)

    def swap(self, partners: NDArray[np.int64]) -> torch.Tensor:
        self._walk.require(PAIRS, "swap()")
        met = self.met(partners)
        self.bytes_sent += 4 * self._layout.size * int((partners >= 0).sum())
        return self.x[torch.from_numpy(met)]

    # What the verbs are made of.

    def _follow(self) -> None:
        """y <- x + mu v, where x was written and y was not."""
        if self.ahead is None or self._followed == self.ahead._version:
            return
        a = _Arguments("x", "x", -1, None, self._ones)
        a.v, a.y = self._rows["v"], self._rows["at"]
        for j in range(self.size):
            self._pass(a, j, self._plain)
        self._was_written(is_y_too=True)

    def _gradients(self) -> Iterable[tuple[int, NDArray[np.void]]]:
        """Each agent's segments with its gradient, once in a step."""
        for part in self._parts:
            self._seen(part)
            yield from zip(part.agents.tolist(), part.segments, strict=True)

    def _local_step(self, a: _Arguments) -> None:
        a.v = self._rows["v"]
        a.y = self._rows["at"] if self.ahead is not None else None
        a.is_local = self._has_local = True
        a.moved = a.moved or self._has_moved
        rest = np.ones(self.size, np.bool_)
        for j, segments in self._gradients():
            self._pass(a, j, segments)
            rest[j] = False
        for j in np.flatnonzero(rest).tolist():
            self._pass(a, j, self._plain)

    def _hold_gradients(self) -> None:
        """Have the gradients that are not used yet computed, and kept."""
        if not self._walk.is_gradient_used:
            self._held = held = Held(self._layout, self.size)
            self._parts = held.parts(self._parts, self._seen)
            self._seen = lambda part: None

    def _average_gradients(self) -> None:
        """Everybody's gradient is the mean, summed in agent order, as a job does it."""
        self._held = held = Held(self._layout, self.size)  # its memory is what the parts point to
        parts = held.parts(self._parts, self._seen)
        self._seen = lambda part: None
        self._parts = held.averaged(parts, self._clip_norm)
        self.bytes_sent += traffic.of_gradients(self._layout, self.size, self._is_ordered)

    def _pass(self, a: _Arguments, j: int, segments: NDArray[np.void]) -> None:
        near: Any = ()
        weights = _NONE
        if isinstance(a.mix, Received):
            near, weights = a.mix.near[j], a.mix.weights[j]
            if a.source > 0:  # `received` has the first slot's
                sources = self._weights[self._walk.turn][1][j]
                near = [self._read[a.source][source] for source in sources]
            if a.weight[j] != 1:
                weights = weights * a.weight[j]
        elif a.mix is not None and a.weight[j]:
            near, weights = [a.mix[j].numpy()], a.weight[j : j + 1]
        over_graph = self.algorithm.over == GRAPH
        has_q = a.source >= 0 and over_graph
        if a.moved or (not has_q and segments["own"].any()) or a.factor[j] != 1:
            segments = segments.copy()
            if a.moved:
                segments["own"] = 1
            elif not has_q:
                segments["own"] = 0
            if a.factor[j] != 1:
                segments["alpha"] *= a.factor[j]
        measure = self._measure if a.is_local or a.is_first else 0
        result = native.update(
            self._rows[a.out][j],
            self._rows[a.start][j],
            at=self._rows["at"][j],
            v=None if a.v is None else a.v[j],
            y=None if a.y is None else a.y[j],
            p=self._write[a.slot][j] if over_graph and a.slot >= 0 and a.publish else None,
            q=self._read[a.source][j] if has_q else None,
            neighbours=near,
            weights=weights,
            segments=segments,
            wire=self._wire,
            threads=torch.get_num_threads(),
            measure=measure,
        )
        self.finite[j] &= result.finite
        if measure and a.is_first:
            self.disagreement[j] = 0.5 * result.disagreement
        if measure and (a.is_local or not self._has_local):
            self.gradient[j], self.moved[j] = result.gradient, result.moved
            self.penalty[j] = 0.5 * result.penalty

    def _pointing_at(self, vector: str, j: int) -> NDArray[np.void]:
        """Segments with the vector in the gradient's place, and the step size."""
        assert self.coefficients is not None
        segments = self._plain.copy()
        rows = segments[: len(self._layout.parameters)]
        rows["grad"] = self._rows[vector][j].ctypes.data + 4 * rows["offset"]
        rows["grad"][rows["length"] == 0] = 0
        rows["alpha"], rows["c_g"] = self.coefficients.alpha, 1.0
        rows["decay"] = rows["mu"] = rows["c_v"] = 0.0
        return segments


class _Arguments:
    """Of an `update`, for the pass of each row."""

    v: Any = None
    y: Any = None
    is_first = False
    is_local = False
    source = -1  # the slot of what is mixed

    def __init__(
        self,
        out: str,
        start: str,
        slot: int,
        mix: Any,
        ones: NDArray[np.float32],
        publish: bool = False,
        moved: bool = False,
    ) -> None:
        self.out, self.start, self.slot, self.mix = out, start, slot, mix
        self.publish, self.moved = publish, moved
        self.factor = self.weight = ones

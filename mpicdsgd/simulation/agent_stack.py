"""The memory of all agents in one process, and the passes over it.

    N    agents
    D    elements of one agent's arena, padding included
    P    two copies (N, D) of what is published: one is read while the other is written

Row j of each array is laid out as agent j's `arena.Arena` is, and each pass over it is the call
that agent j's `stepper.Stepper` makes in a job of N ranks, with the same arguments: the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.comm.exchange.buffer_layout import bytes_of
from mpicdsgd.comm.exchange.header import HEADER_BYTES
from mpicdsgd.comm.exchange.transport import WIRE_DTYPE
from mpicdsgd.graphs.mixing_cycle import Mixing
from mpicdsgd.kernels import native
from mpicdsgd.kernels.arena import Arena


class Stack:
    """See the module. All methods are local.

    A step is `begin`, `finish` for every agent once, `end`.

    Args:
        layout: an arena of one agent's parameters (and mixed buffers).
        flat: float32, shape (N, D), what the agents begin with; it becomes `flat`.
        mixing: for N agents.
        wire: what is published: float32, bfloat16, float16.
        rounds: mixing rounds tau per step.
        has_momentum: whether there is a v.
        look_ahead: rows of `flat` hold y = x + mu v, and another array x.
        messages: count the bytes as where header and values go in one message.

    Attributes:
        steps: steps completed.
        flat: float32, shape (N, D), where the models' parameters are.
        v, ahead: likewise, or None.
        bytes_sent: by all agents together, as a job would count them.
        disagreement, gradient, penalty, moved: float64, shape (N,), of this step, as
            `algorithms.stepper.Measured` has them; only with ``measuring``.
        finite: bool, shape (N,), whether all that the last pass wrote is.
    """

    def __init__(
        self,
        layout: Arena,
        flat: torch.Tensor,
        mixing: Mixing,
        *,
        wire: str,
        rounds: int,
        has_momentum: bool,
        look_ahead: bool,
        messages: bool = False,
        measuring: bool = False,
    ) -> None:
        n, size = mixing.graph.n, layout.size
        self._layout, self._wire, self._rounds = layout, wire, rounds
        assert flat.shape == (n, size), "a row for each agent"
        self.flat = flat
        self.v = torch.zeros_like(self.flat) if has_momentum else None
        self.ahead = self.flat.clone() if look_ahead else None
        self._scratch = torch.empty_like(self.flat) if rounds > 1 else None
        dtype = {np.float32: torch.float32, np.uint16: torch.uint16}[WIRE_DTYPE[wire]]
        copies = [torch.zeros(n, size, dtype=dtype) for _ in range(2)]
        self._x, self._at, self._v, self._ahead, self._z = (
            _rows(stack) for stack in (self.x, self.flat, self.v, self.ahead, self._scratch)
        )
        self._read, self._write = (_rows(copy) for copy in copies)
        self._turns = [
            [(near, np.array(weights, np.float32)) for _, near, weights in map(turn.row, range(n))]
            for turn in mixing.turns
        ]
        self._mixing = layout.mix_only_segments()
        self._measure = len(layout.parameters) if measuring else 0
        self._bytes = [
            _bytes(mixing, turn, size, wire, messages) for turn in range(len(self._turns))
        ]
        self._turn = 0
        self.steps = 0
        self.bytes_sent = 0
        self.disagreement, self.gradient, self.penalty, self.moved = np.zeros((4, n))
        self.finite = np.ones(n, np.bool_)

    @property
    def x(self) -> torch.Tensor:
        """The agents' parameters (and mixed buffers), shape (N, D)."""
        return self.flat if self.ahead is None else self.ahead

    @property
    def mixes_buffers(self) -> bool:
        """Whether rows hold more than parameters: then all forward passes come before `begin`."""
        return len(self._layout.tensors) > len(self._layout.parameters)

    @property
    def agents(self) -> int:
        """N."""
        return len(self.flat)

    def publish(self) -> None:
        """P <- Q(x), before the first step."""
        self._take_buffers()
        for j in range(self.agents):
            self._pass(self._x, self._x, j, self._mixing, last=False, alone=True)
        self._post(0)

    def begin(self) -> None:
        """Make the mixing rounds that come before the one with the gradient."""
        self._take_buffers()
        z = self._x
        for mixing_round in range(self._rounds - 1):
            for j in range(self.agents):
                result = self._pass(
                    self._z, z, j, self._mixing, last=False,
                    measure=self._measure if mixing_round == 0 else 0,
                )  # fmt: skip
                if self._measure and mixing_round == 0:
                    self.disagreement[j] = 0.5 * result.disagreement
            self._post(mixing_round + 1)
            z = self._z

    def finish(self, j: int, segments: NDArray[np.void]) -> None:
        """Agent j's last pass, with its gradient; ``segments`` as of an arena."""
        z = self._x if self._rounds == 1 else self._z
        result = self._pass(self._x, z, j, segments, last=True, measure=self._measure)
        self.finite[j] = result.finite
        if self._measure:
            self.gradient[j], self.moved[j] = result.gradient, result.moved
            self.penalty[j] = 0.5 * result.penalty
            if self._rounds == 1:
                self.disagreement[j] = 0.5 * result.disagreement

    def end(self) -> None:
        """Show what was written, for the next step."""
        self.steps += 1
        self._post(0)

    def _pass(
        self,
        out: Any,
        z: Any,
        j: int,
        segments: NDArray[np.void],
        *,
        last: bool,
        alone: bool = False,
        measure: int = 0,
    ) -> native.Result:
        read = self._read
        near, weights = ((), _NONE) if alone else self._turns[self._turn][j]
        return native.update(
            out[j],
            z[j],
            at=self._at[j],
            v=self._v[j] if last and self._v is not None else None,
            y=self._at[j] if last and self._ahead is not None else None,
            p=self._write[j],
            q=read[j],
            neighbours=[read[source] for source in near],
            weights=weights,
            segments=segments,
            wire=self._wire,
            threads=torch.get_num_threads(),
            measure=measure,
        )

    def _post(self, mixing_round: int) -> None:
        self._read, self._write = self._write, self._read
        self._turn = (self.steps * self._rounds + mixing_round) % len(self._turns)
        self.bytes_sent += self._bytes[self._turn]

    def _take_buffers(self) -> None:
        """What the forward pass made of mixed buffers, it made in `flat`: x has them too."""
        if self.ahead is not None:
            end = self._layout.parameters_end
            self.ahead[:, end:] = self.flat[:, end:]


_NONE = np.zeros(0, np.float32)


def _rows(stack: torch.Tensor | None) -> Any:
    """The rows as arrays, made once: a view takes as long to make as a small pass takes."""
    return None if stack is None else list(stack.numpy())


def stacked_views(layout: Arena, stack: torch.Tensor) -> list[torch.Tensor]:
    """Views into rows laid out as ``layout``: of each parameter, shape (N, ...)."""
    n, size = stack.shape
    return [
        stack.as_strided((n, *view.shape), (size, *view.stride()), view.storage_offset())
        for view in layout.views[: len(layout.parameters)]
    ]


def _bytes(mixing: Mixing, turn: int, size: int, wire: str, messages: bool) -> int:
    """What all agents' posts of this turn count together, as the carriers of `exchange` do."""
    values = bytes_of(size, wire) * sum(map(len, mixing.turns[turn].graph.sources))
    graph = mixing.graph
    if messages and len(mixing.turns) == 1:
        return values + HEADER_BYTES * sum(map(len, graph.sources))
    peers = (
        len({*sources, *readers})
        for sources, readers in zip(graph.sources, graph.destinations, strict=True)
    )
    return values + HEADER_BYTES * sum(peers)

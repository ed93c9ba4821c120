"""The memory of all agents in one process: a row for each, and two copies of what is published.

N    agents
D    elements of one agent's arena, padding included
P    two copies (N, S D) of what is published, S vectors: one is read, the other is written
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mpicdsgd.algorithms.contract import GRAPH, Algorithm
from mpicdsgd.comm.exchange.transport import WIRE_DTYPE
from mpicdsgd.graphs.mixing_cycle import Mixing
from mpicdsgd.kernels.arena import Arena
from mpicdsgd.simulation import traffic
from mpicdsgd.simulation.all_agents import AllAgents

_NONE = np.zeros(0, np.float32)


class RowMemory(AllAgents):
    """See the module; `rows.Rows` works on it. All methods are local.

    Attributes:
        steps: steps completed.
        flat: float32, shape (N, D), where the models' parameters are.
        v, ahead: likewise, or None.
        bytes_sent: by all agents together, as a job would count them.
        disagreement, gradient, penalty, moved: float64, shape (N,), of this step, as
            `measured.Measured` has them; only with ``measuring``.
        finite: bool, shape (N,), whether all that the last step wrote is.
    """

    def __init__(
        self,
        layout: Arena,
        flat: torch.Tensor,
        mixing: Mixing,
        algorithm: Algorithm,
        wire: str,
        messages: bool,
        measuring: bool,
        is_ordered: bool,
    ) -> None:
        assert flat.shape == (mixing.graph.n, layout.size), "a row for each agent"
        super().__init__(flat, mixing, algorithm)
        n, size = flat.shape
        self._layout, self._wire = layout, wire
        self._messages, self._is_ordered = messages, is_ordered
        self.parameters_end = layout.parameters_end
        local = algorithm.settings
        self.flat = flat
        self.v = torch.zeros_like(flat) if local.has_momentum else None
        self.ahead = flat.clone() if local.has_momentum and local.look_ahead else None
        self._rows = {name: _rows(stack) for name, stack in self._own.items()}
        self._rows |= {"x": _rows(self.x), "at": _rows(self.flat), "v": _rows(self.v)}
        dtype = {np.float32: torch.float32, np.uint16: torch.uint16}[WIRE_DTYPE[wire]]
        over_graph = algorithm.over == GRAPH
        width = size * len(algorithm.sends) if over_graph else 0
        copies = [torch.zeros(n, width, dtype=dtype) for _ in range(2)]
        self._read, self._write = (_slotted(copy, len(algorithm.sends)) for copy in copies)
        self._weights = [_weights_of(turn) for turn in mixing.turns]
        self._plain = layout.mix_only_segments()
        if not over_graph:
            self._plain["own"] = 0
        self._measure = len(layout.parameters) if measuring else 0
        self._followed = -1  # the version of x that y goes with
        self._sent: list[tuple[float, ...]] = [() for _ in range(n)]
        self._beside: list[tuple[float, ...]] = self._sent
        self.bytes_sent = 0
        self.disagreement, self.gradient, self.penalty, self.moved = np.zeros((4, n))
        self.finite = np.ones(n, np.bool_)

    @property
    def x(self) -> torch.Tensor:
        """The agents' parameters (and mixed buffers), shape (N, D)."""
        return self.flat if self.ahead is None else self.ahead

    @property
    def flats(self) -> dict[str, torch.Tensor]:
        """The whole state but for ``steps``, by the names that checkpoints have, a row each."""
        flats = {"x": self.x}
        if self.v is not None:
            flats["v"] = self.v
        if self.ahead is not None:
            flats["y"] = self.flat
        own = {f"link/{name}": self._own[name] for name in self.algorithm.vectors}
        numbers = self._numbers.items()
        return flats | own | {f"link/{n}": torch.from_numpy(v[:, None]) for n, v in numbers}

    @property
    def mixes_buffers(self) -> bool:
        """Whether rows hold more than parameters: then all forward passes come before a step."""
        return len(self._layout.tensors) > len(self._layout.parameters)

    def _post(self) -> None:
        self._read, self._write = self._write, self._read
        self._walk.posts(self.steps)
        self._beside = self._sent
        size = self._layout.size * len(self.algorithm.sends)
        self.bytes_sent += traffic.of_post(
            self._mixing, self._walk.turn, size, self._wire, self._messages
        )

    def _take_buffers(self) -> None:
        """What the forward pass made of mixed buffers, it made in `flat`: x has them too."""
        if self.ahead is not None:
            end = self._layout.parameters_end
            self.ahead[:, end:] = self.flat[:, end:]

    def _was_written(self, *, is_y_too: bool = False) -> None:
        if self.ahead is not None:
            self._followed = self.ahead._version if is_y_too else -1


def _rows(stack: torch.Tensor | None) -> Any:
    """The rows as arrays, made once: a view takes as long to make as a small pass takes."""
    return None if stack is None else list(stack.numpy())


def _slotted(copy: torch.Tensor, slots: int) -> list[Any]:
    """Rows of each published vector: one of (N, S D) in S lists."""
    return [list(part.numpy()) for part in copy.chunk(slots, dim=1)]


def _weights_of(turn: Any) -> tuple[list[float], list[Any], list[Any], list[Any]]:
    """Of one matrix: own weights, sources, and the weights of these in float32 and in float64."""
    rows = [turn.row(j) for j in range(turn.graph.n)]
    near = [sources for _, sources, _ in rows]
    exact = [np.array(weights) for _, _, weights in rows]
    return [own for own, _, _ in rows], near, [np.array(w, np.float32) for w in exact], exact

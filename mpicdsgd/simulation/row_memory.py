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


class RowMemory:
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
        n, size = mixing.graph.n, layout.size
        assert flat.shape == (n, size), "a row for each agent"
        self.algorithm, self._layout, self._wire = algorithm, layout, wire
        self._mixing, self._messages, self._is_ordered = mixing, messages, is_ordered
        self.ranks, self.size, self.parameters_end = np.arange(n), n, layout.parameters_end
        self.neighbours, self.readers = mixing.graph.sources, mixing.graph.destinations
        local = algorithm.settings
        self.flat = flat
        self.v = torch.zeros_like(flat) if local.has_momentum else None
        self.ahead = flat.clone() if local.has_momentum and local.look_ahead else None
        self._own = {name: torch.zeros_like(flat) for name in algorithm.vectors}
        if algorithm.posts > 1:
            self._own["mixed"] = torch.empty_like(flat)
        self._numbers = {name: np.full(n, value) for name, value in algorithm.numbers.items()}
        self._rows = {name: _rows(stack) for name, stack in self._own.items()}
        self._rows |= {"x": _rows(self.x), "at": _rows(self.flat), "v": _rows(self.v)}
        self._slots = {name: slot for slot, name in enumerate(algorithm.sends)} | {"mixed": 0}
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
        self._turn = self._round = self._fresh = 0
        self._is_to_post = False
        self._sent: list[tuple[float, ...]] = [() for _ in range(n)]
        self._beside: list[tuple[float, ...]] = self._sent
        self.steps = 0
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
        self._turn = (self.steps * self.algorithm.posts + self._round) % len(self._weights)
        self._beside = self._sent
        size = self._layout.size * len(self.algorithm.sends)
        self.bytes_sent += traffic.of_post(
            self._mixing, self._turn, size, self._wire, self._messages
        )
        self._round += 1
        self._fresh, self._is_to_post = 0, False

    def _take_buffers(self) -> None:
        """What the forward pass made of mixed buffers, it made in `flat`: x has them too."""
        if self.ahead is not None:
            end = self._layout.parameters_end
            self.ahead[:, end:] = self.flat[:, end:]

    # The verbs of asynchronous algorithms.

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


_ALONE = "asynchronous algorithms are not simulated"


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

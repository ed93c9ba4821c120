"""What a server does with what it is sent. NumPy, no MPI.

    elastic    c <- c + e (x - c)                 of an agent that does x <- x + e (c - x)
    downpour   x <- x - alpha h                   h: an agent's gradients since its last push
    adagrad    s <- s + h^2,  x <- x - alpha h / (sqrt(s) + eps)

(Zhang, Choromanska, LeCun 2015, algorithm 1; Dean et al. 2012.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

ELASTIC, DOWNPOUR, ADAGRAD = range(3)
_EPS = np.float32(1e-10)  # torch.optim.Adagrad's
_HEAD = 16


@dataclass(frozen=True)
class Setup:
    """How a server is set up, as an agent sends it.

    Attributes:
        kind: ELASTIC, DOWNPOUR or ADAGRAD.
        x: the model to begin with, float32, shape (D,).
        segments: offset and length of each tensor in x, int64, shape (T, 2).
        elasticity: e.
    """

    kind: int
    x: Floats
    segments: NDArray[np.int64]
    elasticity: float = 0.0

    def body(self) -> Floats:
        """As a message."""
        head = np.zeros(_HEAD, np.float32)
        head[:6].view(np.int64)[:] = self.kind, self.x.size, len(self.segments)
        head[6] = self.elasticity
        segments = np.ascontiguousarray(self.segments, np.int64).reshape(-1).view(np.float32)
        return np.concatenate([head, segments, self.x])


class Rule:
    """The server's model, and what it does to it.

    Attributes:
        x: float32, shape (D,).
    """

    def __init__(self, setup: Setup) -> None:
        self.x = setup.x.copy()
        self._kind = setup.kind
        self._segments = setup.segments.tolist()
        self._elasticity = np.float32(setup.elasticity)
        self._squares = np.zeros_like(self.x) if setup.kind == ADAGRAD else None

    def arrays(self) -> list[Floats]:
        """The whole state, to be written in place."""
        return [self.x] if self._squares is None else [self.x, self._squares]

    def exchange(self, x: Floats) -> None:
        """An agent's parameters, shape (D,), pull at the model."""
        # Bit by bit what the agent adds to its own.
        self.x -= self._elasticity * (self.x - x)

    def push(self, body: Floats) -> None:
        """A step with an agent's gradients: after the head a step size for each tensor, then h."""
        count = len(self._segments)
        alphas, h = body[_HEAD : _HEAD + count], body[_HEAD + count :]
        if self._squares is not None:
            self._squares += h * h
        for alpha, (offset, length) in zip(alphas, self._segments, strict=True):
            part = slice(offset, offset + length)
            step = alpha * h[part]
            if self._squares is not None:
                step /= np.sqrt(self._squares[part]) + _EPS
            self.x[part] -= step


def rule_from(body: Floats) -> Rule:
    """The rule that a `Setup.body` asks for."""
    kind, size, count = body[:6].view(np.int64).tolist()
    end = _HEAD + 4 * count
    segments = body[_HEAD:end].view(np.int64).reshape(count, 2).copy()
    return Rule(Setup(kind, body[end : end + size], segments, float(body[6])))

"""One agent's memory and the passes over it: wait for the neighbours, update, publish.

    h   =  g + lambda x                                         g: minibatch gradient
    v  <-  mu v - alpha h
    x  <-  x + sum_{l != j} Pi[j,l] (p_l - p_j)  +  c_v v  -  c_g alpha h
    p_j <- x                                                    published for the next step

The exchange of step k is under way while the user computes the gradient of step k. On a GPU a pass
is only given to the stream here; nothing waits for it.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.agents import Agents
from mpicdsgd.arena import Arena
from mpicdsgd.exchange import AgentFault, ExchangeConfig, Reason, open_exchange
from mpicdsgd.update import Outcome, make_update

log = logging.getLogger("mpicdsgd")


class Stepper:
    """See the module. Making one opens the exchange, so it is collective over ``agents``.

    `begin`, then `advance` or `publish`; all but these two and `close` are local.

    Args:
        arena: the parameters (and mixed buffers).
        rounds: mixing rounds tau per step.
        has_momentum: whether there is a v.
        look_ahead: the arena holds y = x + mu v, and a buffer of its own x.
        debug: find writes through ``.data`` too, by a checksum of all parameters each step.

    Attributes:
        steps: steps completed.
        exchange: the open exchange.
        v: float32, shape (D,), or None; ahead: x where the arena holds y, likewise.
        skipped_means_fault: whether a gradient that a pass left out is a loss that is no number.
    """

    def __init__(
        self,
        agents: Agents,
        arena: Arena,
        config: ExchangeConfig,
        *,
        rounds: int,
        has_momentum: bool,
        look_ahead: bool,
        debug: bool,
    ) -> None:
        self.arena = arena
        self.steps = 0
        self.skipped_means_fault = False
        self.exchange = open_exchange(agents, arena.size, config)
        self.v = torch.zeros_like(arena.flat) if has_momentum else None
        self.ahead = arena.flat.clone() if look_ahead else None
        self._scratch = torch.empty_like(arena.flat) if rounds > 1 else None
        self._rank, self._rounds, self._debug = agents.rank, rounds, debug
        self._weights = [np.array(turn.weights, dtype=np.float32) for turn in agents.turns]
        self._update = make_update(agents, config.wire, config.timeout_s)
        self._outcomes: deque[tuple[int, Outcome]] = deque()
        self._checksum = 0
        self._turn = 0
        self.exchange.before_closing = self.settle

    @property
    def x(self) -> torch.Tensor:
        """The agent's parameters, shape (D,)."""
        return self.arena.flat if self.ahead is None else self.ahead

    def flats(self) -> dict[str, torch.Tensor]:
        """The whole state but for `steps`: x, v, y, each of shape (D,)."""
        flats = {"x": self.x}
        if self.v is not None:
            flats["v"] = self.v
        if self.ahead is not None:
            flats["y"] = self.arena.flat
        return flats

    def begin(self) -> None:
        """Find out whether the parameters are still ours and as we left them."""
        moved = self.arena.repair()
        written = self.arena.changed() or (self._debug and self._checksum != self.arena.checksum())
        if moved or written:
            log.error(
                "agent %d: parameters were changed outside step() since they were last published; "
                "all agents will stop",
                self._rank,
            )
            self.exchange.report(Reason.CHANGED_BY_HAND)
            self._accept()
        self._take_buffers()

    def advance(
        self,
        segments: NDArray[np.void],
        scale: torch.Tensor | None = None,
        overflow: torch.Tensor | None = None,
    ) -> None:
        """Wait, pass, post: ``rounds`` times; the gradient is applied in the last round.

        Args:
            segments, scale, overflow: see `update.Update`.

        Raises:
            AgentFault: on all agents alike, where the fault known to all is due.
            ExchangeError: if a neighbour is missing, left or out of step.
        """
        z = self.x
        for mixing_round in range(self._rounds - 1):
            assert self._scratch is not None
            neighbours = self.exchange.wait(self.steps, mixing_round)
            mixing = self.arena.mix_only_segments()
            self._pass(self._scratch, z, neighbours, mixing, last=False)
            self._post(mixing_round + 1)
            z = self._scratch
        neighbours = self.exchange.wait(self.steps, self._rounds - 1)
        outcome = self._pass(
            self.x, z, neighbours, segments, last=True, scale=scale, overflow=overflow
        )
        self.arena.written()
        self._accept()
        self.steps += 1
        self._outcomes.append((self.steps, outcome))
        self._judge(self._update.lag)
        self._post()
        if self.exchange.fault.step <= self.steps:
            self.exchange.fault_raised = True
            raise AgentFault(self.exchange.fault)

    def publish(self) -> None:
        """Write p <- Q(x) and post; the exchange must be free."""
        self._take_buffers()
        segments = self.arena.mix_only_segments()
        outcome = self._pass(self.x, self.x, [], segments, last=False)
        self._outcomes.append((self.steps, outcome))
        self.settle()
        self._accept()
        self._post()

    def settle(self) -> None:
        """Learn what became of all passes so far, waiting for a GPU."""
        self._judge(0)

    def close(self) -> None:
        """End the exchange. Collective.

        Raises:
            AgentFault: on all agents, for a fault that the last steps found and none has raised.
        """
        try:
            self.exchange.close()
        finally:
            self._update.close()

    def _pass(
        self,
        out: torch.Tensor,
        z: torch.Tensor,
        neighbours: list[Any],
        segments: NDArray[np.void],
        *,
        last: bool,
        scale: torch.Tensor | None = None,
        overflow: torch.Tensor | None = None,
    ) -> Outcome:
        return self._update(
            out,
            z,
            at=self.arena.flat,
            v=self.v if last else None,
            y=self.arena.flat if last and self.ahead is not None else None,
            p=self.exchange.published,
            q=self.exchange.previous,
            neighbours=neighbours,
            weights=self._weights[self._turn][: len(neighbours)],
            segments=segments,
            scale=scale,
            overflow=overflow,
        )

    def _post(self, mixing_round: int = 0) -> None:
        """Show what was written; what is read with it is mixed by the matrix of this turn."""
        self._turn = (self.steps * self._rounds + mixing_round) % len(self._weights)
        self.exchange.post(self.steps, mixing_round, self._turn)

    def _judge(self, keep: int) -> None:
        """Report what passes found, but for the last ``keep``."""
        while len(self._outcomes) > keep:
            step, outcome = self._outcomes.popleft()
            if not outcome.finite():
                self.exchange.report(Reason.NON_FINITE, step)
            elif self.skipped_means_fault and outcome.skipped():
                self.exchange.report(Reason.NON_FINITE_LOSS, step)

    def _take_buffers(self) -> None:
        """What the forward pass made of mixed buffers, it made in the arena: x has them too."""
        if self.ahead is not None:
            end = self.arena.parameters_end
            self.ahead[end:] = self.arena.flat[end:]

    def _accept(self) -> None:
        self.arena.accept()
        self._checksum = self.arena.checksum() if self._debug else 0

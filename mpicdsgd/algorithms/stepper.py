"""One agent's memory and the passes over it: wait for the neighbours, update, publish.

    h   =  g + lambda x                                         g: minibatch gradient
    v  <-  mu v - alpha h
    x  <-  x + sum_{l != j} Pi[j,l] (p_l - p_j)  +  c_v v  -  c_g alpha h
    p_j <- x                                                    published for the next step

The exchange of step k is under way while the user computes the gradient of step k. On a GPU a pass
is only given to the stream here; nothing waits for it. Where a `comm.links.link.Link` is in the
exchange's place it says what is mixed in when; nothing else differs.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.errors import AgentFault
from mpicdsgd.comm.exchange.exchange import Exchange
from mpicdsgd.comm.exchange.header import Reason
from mpicdsgd.comm.exchange.opening import ExchangeConfig
from mpicdsgd.comm.links.link import Link
from mpicdsgd.kernels.arena import Arena
from mpicdsgd.kernels.update import Outcome, make_update

log = logging.getLogger("mpicdsgd")


class Measured(NamedTuple):
    """What this agent measured at x_k, before step k; parameters only, no mixed buffers.

    Attributes:
        step: k.
        disagreement: D_j = 1/2 sum_l Pi[j,l] |p_l - p_j|^2, of what is published. Over all agents
            these add up to 1/2 sum_jl Pi[j,l] |x_l - x_j|^2, which for a doubly stochastic Pi is
            |X|^2_(I - Pi) of the paper's V = sum_j f_j + 1/(2 alpha) |X|^2_(I - Pi), eq. (9).
        gradient: |h|^2, h the gradient that is applied, with weight decay; 0 where there was none.
        penalty: P_j = 1/2 sum lambda x^2 where the gradient is taken, lambda the weight decay.
        moved: |x_(k+1),j - x_k,j|^2 by the pass.
    """

    step: int
    disagreement: float
    gradient: float
    penalty: float
    moved: float


class Beside(NamedTuple):
    """What is measured of a step that was made before the pass, which does not see it.

    Attributes:
        gradient, penalty: as `Measured` has them, shape (), not waited for.
    """

    gradient: torch.Tensor
    penalty: torch.Tensor


class _Pass(NamedTuple):
    """A pass whose outcome is still to be heard of."""

    step: int
    outcome: Outcome
    at_x: Outcome | None = None  # the step's first pass, if it measures
    beside: Beside | None = None


class Stepper:
    """See the module. Making one opens the exchange, so it is collective over ``agents``.

    `begin`, then `advance` or `publish`; all but these two and `close` are local.

    Args:
        arena: the parameters (and mixed buffers).
        exchange: open, of the arena's size; the stepper closes it.
        weights: of what it gives to be mixed in, in each turn, float32.
        config: wire type and timeout.
        rounds: mixing rounds tau per step.
        has_momentum: whether there is a v.
        look_ahead: the arena holds y = x + mu v, and a buffer of its own x.
        debug: find writes through ``.data`` too, by a checksum of all parameters each step.

    Attributes:
        steps: steps completed.
        v: float32, shape (D,), or None; ahead: x where the arena holds y, likewise.
        skipped_means_fault: whether a gradient that a pass left out is a loss that is no number.
        measuring: whether steps add to ``measured``. With several mixing rounds the first one is
            at x_k, and measured. Only a graph has a disagreement: not where there is a link.
        measured: of the steps whose passes are known to be done; whoever reads it empties it.
    """

    def __init__(
        self,
        agents: Agents,
        arena: Arena,
        exchange: Exchange | Link,
        weights: list[NDArray[np.float32]],
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
        self.measuring = False
        self.measured: list[Measured] = []
        self.exchange = exchange
        self.v = torch.zeros_like(arena.flat) if has_momentum else None
        self.ahead = arena.flat.clone() if look_ahead else None
        self._scratch = torch.empty_like(arena.flat) if rounds > 1 else None
        self._rank, self._rounds, self._debug = agents.rank, rounds, debug
        self._weights = weights
        self._update = make_update(agents.gpu, config.wire, config.timeout_s)
        self._outcomes: deque[_Pass] = deque()
        self._checksum = 0
        self._turn = 0
        if isinstance(exchange, Link):
            exchange.attach(self)
            arena.segments["own"] = 0  # nothing is published: the difference is to x itself
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
        beside: Beside | None = None,
    ) -> None:
        """Wait, pass, post: ``rounds`` times; the gradient is applied in the last round.

        Args:
            segments, scale, overflow: see `kernels.update.Update`.
            beside: where the gradient was applied before, and ``segments`` have none.

        Raises:
            AgentFault: on all agents alike, where the fault known to all is due.
            ExchangeError: if a neighbour is missing, left or out of step.
        """
        z = self.x
        measure = len(self.arena.parameters) if self.measuring else 0
        at_x: Outcome | None = None
        for mixing_round in range(self._rounds - 1):
            assert self._scratch is not None
            neighbours = self.exchange.wait(self.steps, mixing_round)
            mixing = self.arena.mix_only_segments()
            mixed = self._pass(
                self._scratch, z, neighbours, mixing, last=False,
                measure=measure if mixing_round == 0 else 0,
            )  # fmt: skip
            at_x = at_x or mixed
            self._post(mixing_round + 1)
            z = self._scratch
        neighbours = self.exchange.wait(self.steps, self._rounds - 1)
        outcome = self._pass(
            self.x, z, neighbours, segments, last=True, scale=scale, overflow=overflow,
            measure=measure,
        )  # fmt: skip
        self._was_written()
        self.steps += 1
        at_x = (at_x or outcome) if self.measuring else None
        self._outcomes.append(_Pass(self.steps, outcome, at_x, beside))
        self._judge(self._update.lag)
        self._post()
        if self.exchange.fault.step <= self.steps:
            self.exchange.fault_raised = True
            self.exchange.meet()
            raise AgentFault(self.exchange.fault)

    def publish(self) -> None:
        """Write p <- Q(x) and post; the exchange must be free."""
        self._take_buffers()
        segments = self.arena.mix_only_segments()
        outcome = self._pass(self.x, self.x, [], segments, last=False)
        self._outcomes.append(_Pass(self.steps, outcome))
        self.settle()
        self._accept()
        self._turn = self._turn_of(0)
        self.exchange.begin(self.steps, self._turn)

    def mix_in(self, other_D: torch.Tensor, weight: float) -> None:
        """x <- x + weight (other - x). Not with look-ahead."""
        other = other_D.numpy() if other_D.device.type == "cpu" else other_D.data_ptr()
        outcome = self._update(
            self.x,
            self.x,
            at=self.arena.flat,
            v=None,
            y=None,
            p=None,
            q=None,
            neighbours=[other],
            weights=np.array([weight], np.float32),
            segments=self.arena.mix_only_segments(),
        )
        self._outcomes.append(_Pass(self.steps, outcome))
        self._was_written()

    def replace(self, values_D: torch.Tensor) -> None:
        """x <- values, shape (D,); with look-ahead y too, as v is 0 then."""
        self.x.copy_(values_D)
        if self.ahead is not None:
            self.arena.flat.copy_(values_D)
        self._was_written()

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
        measure: int = 0,
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
            measure=measure,
        )

    def _post(self, mixing_round: int = 0) -> None:
        """Show what was written; what is read with it is mixed by the matrix of this turn."""
        self._turn = self._turn_of(mixing_round)
        self.exchange.post(self.steps, mixing_round, self._turn)

    def _turn_of(self, mixing_round: int) -> int:
        return (self.steps * self._rounds + mixing_round) % len(self._weights)

    def _was_written(self) -> None:
        self.arena.written()
        self._accept()

    def _judge(self, keep: int) -> None:
        """Report what passes found, but for the last ``keep``."""
        while len(self._outcomes) > keep:
            step, outcome, at_x, beside = self._outcomes.popleft()
            if at_x is not None:
                gradient, penalty = outcome.gradient(), 0.5 * outcome.penalty()
                if beside is not None:
                    penalty = float(beside.penalty)
                    gradient = 0.0 if outcome.skipped() else float(beside.gradient)
                apart = 0.5 * at_x.disagreement()
                self.measured.append(Measured(step - 1, apart, gradient, penalty, outcome.moved()))
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

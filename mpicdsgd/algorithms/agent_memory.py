"""One agent's memory in a job: its vectors, and what became of the passes over them."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.algorithms.contract import Algorithm
from mpicdsgd.algorithms.measured import Measured, Passes
from mpicdsgd.algorithms.torch_step import TorchStep
from mpicdsgd.algorithms.walk import Walk
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.communication import Communication
from mpicdsgd.comm.exchange.header import Reason
from mpicdsgd.comm.exchange.opening import ExchangeConfig
from mpicdsgd.kernels.arena import Arena
from mpicdsgd.kernels.update import Pass, make_update

log = logging.getLogger("mpicdsgd")


_INTERRUPTED = (
    "the last step was interrupted by an exception: the agents are out of step, end the job and go "
    "on from a checkpoint"
)


class AgentMemory:
    """See the module; `context.AgentContext` works on it. Making one is local.

    Attributes:
        steps: steps completed.
        v: float32, shape (D,), or None; ahead: x where the arena holds y = x + mu v, likewise.
        before: x before a torch optimizer's step, where nothing is published; see `keep_x`.
        skipped_means_fault: whether a gradient that a pass left out is a loss that is no number.
        measuring: whether steps add to ``measured``. With several mixing rounds the first one is
            at x_k, and measured.
        measured: of the steps whose passes are known to be done; whoever reads it empties it.
    """

    def __init__(
        self,
        agents: Agents,
        arena: Arena,
        algorithm: Algorithm,
        communication: Communication,
        config: ExchangeConfig,
        torch_step: TorchStep | None,
        debug: bool,
    ) -> None:
        self.arena, self.communication, self.algorithm = arena, communication, algorithm
        self.steps = 0
        self.skipped_means_fault = self.measuring = False
        self.measured: list[Measured] = []
        self.before: Any = None
        self._rank, self._debug = agents.rank, debug
        self._update = make_update(agents.gpu, config.wire, config.timeout_s)
        self._outcomes: deque[Passes] = deque()
        self._checksum = 0
        self._is_loaded = self._is_busy = False
        self._followed = -1  # the version of x that y goes with
        self._walk = Walk(algorithm, 1, len(agents.mixing.turns))
        local = algorithm.settings
        has_momentum = local.has_momentum and torch_step is None
        self.v = torch.zeros_like(arena.flat) if has_momentum else None
        self.ahead = arena.flat.clone() if has_momentum and local.look_ahead else None
        self._own = {name: torch.zeros_like(arena.flat) for name in algorithm.vectors}
        if algorithm.posts > 1:
            self._own["mixed"] = torch.empty_like(arena.flat)
        self._numbers = {
            name: torch.full((1,), value, dtype=torch.float64)
            for name, value in algorithm.numbers.items()
        }
        if not communication.carries_values:
            arena.segments["own"] = 0  # nothing is published: the difference is to x itself
        communication.before_closing = self.settle

    @property
    def x(self) -> torch.Tensor:
        """The agent's parameters, shape (D,)."""
        return self.arena.flat if self.ahead is None else self.ahead

    @property
    def flats(self) -> dict[str, torch.Tensor]:
        """The whole state but for ``steps``: float32 of shape (D,), numbers of shape (1,); views.

        x, v where there is momentum, y = x + mu v with look-ahead, and below "link/" what algorithm
        and communication keep.
        """
        flats = {"x": self.x}
        if self.v is not None:
            flats["v"] = self.v
        if self.ahead is not None:
            flats["y"] = self.arena.flat
        own = {f"link/{name}": self._own[name] for name in self.algorithm.vectors}
        numbers = {f"link/{name}": value for name, value in self._numbers.items()}
        shared = {f"link/{name}": value for name, value in self.communication.arrays().items()}
        return flats | own | numbers | shared

    def begun_anew(self, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """``arrays`` of another number of agents, as the algorithm goes on with them. Local."""
        firsts = self.algorithm.numbers
        anew = {f"link/{name}": firsts.get(name, 0.0) for name in self.algorithm.anew}
        return arrays | {name: np.full_like(arrays[name], first) for name, first in anew.items()}

    def load(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Take over `flats` of then; `begin` follows. Local."""
        for name, flat in self.flats.items():
            flat.copy_(torch.from_numpy(np.array(arrays[name])))
        prefix = "link/"
        own = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
        self.communication.load({name: own[name] for name in self.communication.arrays()})
        self._is_loaded = True

    def begin_step(self) -> None:
        """Find out whether the parameters are still ours and as we left them."""
        moved = self.arena.repair()
        written = self.arena.changed() or (self._debug and self._checksum != self.arena.checksum())
        if moved or written:
            log.error(
                "agent %d: parameters were changed outside step() since they were last published; "
                "all agents will stop",
                self._rank,
            )
            self.communication.report(Reason.CHANGED_BY_HAND)
            self._accept()
        self._take_buffers()

    def withdraw(self) -> None:
        """Have nothing under way, as parameters are to be changed. Collective."""
        if self._is_busy:
            raise RuntimeError(_INTERRUPTED)
        self.communication.withdraw(self.steps)

    def _enter(self) -> None:
        """Begin what an exception would leave half done: then nothing follows it."""
        if self._is_busy:
            raise RuntimeError(_INTERRUPTED)
        self._is_busy = True

    def keep_x(self) -> None:
        """Keep x as it is before a torch optimizer's step, where nothing is published."""
        self._kept = self.x.clone()
        on_host = self._kept.device.type == "cpu"
        self.before = self._kept.numpy() if on_host else self._kept.data_ptr()

    def settle(self) -> None:
        """Learn what became of all passes so far, waiting for a GPU."""
        self._judge(0)

    def _flat(self, name: str) -> torch.Tensor:
        if name == "x":
            return self.x
        return self._own[name] if name in self._own else self._walk.unknown(name)

    def _was_written(self, *, is_y_too: bool = False, is_same: bool = False) -> None:
        if self.ahead is not None and not is_same:
            self._followed = self.ahead._version if is_y_too else -1
        self.arena.written()
        self._accept()

    def _judge(self, keep: int) -> None:
        """Report what passes found, but for those of the last ``keep`` steps."""
        while len(self._outcomes) > keep:
            passes = self._outcomes.popleft()
            outcome = passes.local or passes.last
            if passes.is_measured:
                gradient, penalty = outcome.gradient(), 0.5 * outcome.penalty()
                if passes.beside is not None:
                    penalty = float(passes.beside.penalty)
                    gradient = 0.0 if outcome.skipped() else float(passes.beside.gradient)
                apart = 0.0 if passes.at_x is None else 0.5 * passes.at_x.disagreement()
                self.measured.append(
                    Measured(passes.step - 1, apart, gradient, penalty, outcome.moved())
                )
            judged = (*passes.others, passes.last)
            finite = [one.finite() for one in judged]
            if not all(finite):
                # Who has it from a neighbour's step 4 says 5, so that the neighbour is named.
                is_heard = passes.alone > 0 and all(finite[: passes.alone])
                self.communication.report(Reason.NON_FINITE, passes.step + is_heard)
            elif self.skipped_means_fault and any(one.skipped() for one in judged):
                self.communication.report(Reason.NON_FINITE_LOSS, passes.step)

    def _take_buffers(self) -> None:
        """What the forward pass made of mixed buffers, it made in the arena: x has them too."""
        if self.ahead is not None:
            end = self.arena.parameters_end
            self.ahead[end:] = self.arena.flat[end:]

    def _accept(self) -> None:
        self.arena.accept()
        self._checksum = self.arena.checksum() if self._debug else 0

    def _follow(self) -> None:
        """y <- x + mu v, where x was written and y was not."""
        if self.ahead is None or self._followed == self.ahead._version:
            return
        y, segments = self.arena.flat, self.arena.mix_only_segments()
        segments["own"] = 0
        self._update(Pass(self.ahead, self.ahead, at=y, v=self.v, y=y, segments=segments))
        self._was_written(is_y_too=True)

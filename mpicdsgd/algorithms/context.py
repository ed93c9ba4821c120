"""A step in a job: the verbs of `contract.Context` for one agent.

The exchange of step k is under way while the user computes the gradient of step k. On a GPU a pass
is only given to the stream here; nothing waits for it. What is published at the end of a step is
posted when the step is counted and judged, so that headers say how many steps are complete.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.algorithms.agent_links import AgentLinks
from mpicdsgd.algorithms.contract import Algorithm
from mpicdsgd.algorithms.measured import Beside, Passes
from mpicdsgd.algorithms.received import Received, weights_of
from mpicdsgd.algorithms.torch_step import TorchStep
from mpicdsgd.algorithms.walk import per_agent
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.communication import Communication, NoHooks
from mpicdsgd.comm.exchange.errors import AgentFault
from mpicdsgd.comm.exchange.opening import ExchangeConfig
from mpicdsgd.comm.exchange.transport import WIRE_DTYPE
from mpicdsgd.kernels.arena import Arena
from mpicdsgd.kernels.update import Outcome, Pass

_NONE = np.empty(0, np.float32)


class AgentContext(AgentLinks):
    """See the module and `contract.Context`. Making one is local.

    `begin_step`, then `advance` or `begin`; all but these two and `close` are local.

    Args:
        arena: the parameters (and mixed buffers).
        communication: open, of the arena's size; the context closes it.
        config: wire type, timeout, order of sums.
        torch_step: in the place of the fused local step.
        debug: find writes through ``.data`` too, by a checksum of all parameters each step.
    """

    def __init__(
        self,
        agents: Agents,
        arena: Arena,
        algorithm: Algorithm,
        communication: Communication,
        config: ExchangeConfig,
        *,
        torch_step: TorchStep | None,
        debug: bool,
    ) -> None:
        super().__init__(agents, arena, algorithm, communication, config, torch_step, debug)
        self.server: Any = communication
        self.size, self.parameters_end = agents.size, arena.parameters_end
        self.ranks = np.array([agents.rank])
        self.neighbours, self.readers = agents.graph.sources, agents.graph.destinations
        self._torch = torch_step
        self._weights = weights_of(agents.mixing, agents.rank)
        self._is_one = len(algorithm.sends) == 1
        self._wire_bytes = np.dtype(WIRE_DTYPE[config.wire]).itemsize
        self._sent_numbers: tuple[float, ...] = ()
        self.coefficients = ()
        self._gradient = self._scale = self._overflow = None
        self._made: list[Outcome] = []
        self._alone = 0
        self._at_x: Outcome | None = None
        self._local: Outcome | None = None
        self._open_parts(config, agents)
        communication.hooks = self

    # The walk of a step.

    def advance(
        self,
        segments: NDArray[np.void] | None,
        scale: torch.Tensor | None = None,
        overflow: torch.Tensor | None = None,
        beside: Beside | None = None,
    ) -> None:
        """Make the algorithm's step, count it, judge its passes, and post what is to be shown.

        Args:
            segments: with gradients and coefficients; None: a step without a gradient.
            scale, overflow: see `update.Update`.
            beside: where a torch optimizer applies the gradient.

        Raises:
            AgentFault: on all agents alike, where the fault known to all is due.
            ExchangeError: if a neighbour is missing, left or out of step.
        """
        self._gradient, self._scale, self._overflow = segments, scale, overflow
        self._made, self._at_x, self._local, self._alone = [], None, None, 0
        self._enter()
        self._walk.begin_step()
        self.algorithm.step(self)
        self._walk.end_step()
        self._follow()
        self.steps += 1
        if self._made:
            *others, last = self._made
            more = (self._local, self._at_x, beside, self._alone, self.measuring)
            self._outcomes.append(Passes(self.steps, last, tuple(others), *more))
        self._judge(self._update.lag)
        if self._walk.is_to_post:
            self._post()
        self.communication.after(self.steps)
        self._is_busy = False
        if self.communication.fault.step <= self.steps:
            self.communication.fault_raised = True
            self.communication.meet()
            raise AgentFault(self.communication.fault)

    def begin(self) -> None:
        """Have the algorithm take the parameters as they are; nothing is under way. Collective."""
        self._take_buffers()
        self._made = []
        self._walk.begin()
        self._enter()
        self.communication.begin(self.steps)
        self._was_written(is_y_too=True)
        self.algorithm.begin(self, not self._is_loaded)
        self._follow()
        self._is_loaded = False
        if self._made:
            self._outcomes.append(Passes(self.steps, self._made[-1], tuple(self._made[:-1])))
        self.settle()
        self._accept()
        if self._walk.is_to_post:
            self._post()
        self._is_busy = False

    def close(self) -> None:
        """End the communication. Collective.

        Raises:
            AgentFault: on all agents, for a fault that the last steps found and none has raised.
        """
        try:
            self.communication.close()
        finally:
            self.communication.hooks = NoHooks()  # it refers to who refers to this
            self._update.close()

    # The verbs: see `contract.Context`.

    @property
    def step(self) -> int:
        return self.steps

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._flat(name).view(1, -1)

    def number(self, name: str) -> NDArray[np.float64]:
        if name not in self._numbers:
            self._walk.unknown(name)
        array: NDArray[np.float64] = self._numbers[name].numpy()
        return array

    def column(self, numbers: NDArray[np.float64]) -> torch.Tensor:
        rounded = torch.from_numpy(np.asarray(numbers, np.float32)).view(-1, 1)
        return rounded.to(self.arena.flat.device)

    def publish(self, **numbers: NDArray[np.float64]) -> None:
        (self._sent_numbers,) = self._walk.publishes(numbers)
        for name in self.algorithm.sends:
            if not self._walk.is_fresh(name):
                self.update(name)

    def received(self) -> Received:
        walk = self._walk
        if walk.is_to_post:
            self._post()
            self._alone = self._alone or len(self._made)
        serial = walk.receives()
        near = self.communication.wait(self.steps, walk.round)
        own, weights, exact = self._weights[walk.turn]
        beside = self.communication.numbers() if walk.names else []
        return Received(
            [near], [weights], [own], [exact], walk.names, [self._sent_numbers], [beside], serial
        )

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
        is_local = gradient is True  # the local step, in its place
        if is_local:
            self._walk.uses_gradient()
        slot = self._walk.slots.get(out, -1)
        near, weights, source = self._near(out, start, of, mix, weight)
        if not near and mix is not None and not gradient and not isinstance(mix, Received):
            return  # of weight 0: this agent's row is left alone
        p, q = self._published(slot, source if near else slot, near, publish)
        segments = self._segments(gradient, factor, moved or bool(of), has_q=q is not None)
        is_at_x = source == 0 and isinstance(mix, Received) and self._at_x is None
        measured = self.measuring and (is_local or is_at_x)
        out_D = self._flat(out)
        outcome = self._update(
            Pass(
                out_D,
                self._flat(start) if start else out_D,
                at=self.arena.flat,
                v=self.v if is_local else None,
                y=self.arena.flat if is_local and self.ahead is not None else None,
                p=p,
                q=q,
                neighbours=near,
                weights=weights,
                segments=segments,
                scale=self._scale if is_local else None,
                overflow=self._overflow if is_local else None,
                measure=len(self.arena.parameters) if measured else 0,
            )
        )
        self._made.append(outcome)
        self._local = outcome if is_local else self._local
        self._at_x = outcome if is_at_x else self._at_x
        if slot >= 0:
            self._walk.wrote(slot, None if p is None else out_D)
        if out == "x":
            is_same = not near and not gradient and not start  # only shown, as it was
            self._was_written(is_y_too=is_local, is_same=is_same)

    def take_gradient(self, into: str) -> None:
        self._walk.uses_gradient()
        into_D = self._flat(into)
        if self._gradient is None:
            return
        segments = self._gradient.copy()
        segments["alpha"], segments["own"] = -1.0, 0  # v <- 0 v + h, and x + 0 v is x
        segments["mu"] = segments["c_v"] = segments["c_g"] = 0.0
        x = self.x
        outcome = self._update(
            Pass(
                x, x, at=self.arena.flat, v=into_D, segments=segments,
                scale=self._scale, overflow=self._overflow,
            )
        )  # fmt: skip
        self._made.append(outcome)
        self._was_written()

    def replace(self, values: torch.Tensor) -> None:
        self.x.copy_(values[0])
        self._was_written()

    # What the communication asks: see `communication.Hooks`.

    def rest(self) -> None:
        self.algorithm.rest(self)

    def centre(self) -> torch.Tensor | None:
        return self.algorithm.centre(self)

    # What the verbs are made of.

    def _near(
        self, out: str, start: str, of: str, mix: Received | torch.Tensor | None, weight: Any
    ) -> tuple[list[Any], NDArray[np.float32], int]:
        """What is mixed, the weights, and which of the vectors that are sent it is, or -1."""
        if mix is None:
            return [], _NONE, -1
        one = per_agent(weight, 1)
        if isinstance(mix, Received):
            slot = self._walk.source(out, start, of, mix)
            near, weights = mix.near[0], mix.weights[0]
            near = near if self._is_one else [self._part(n, slot) for n in near]
            return near, weights if one[0] == 1 else weights * one[0], slot
        row = mix[0]
        address = row.numpy() if row.device.type == "cpu" else row.data_ptr()
        return ([address], np.array(one), -1) if one[0] != 0 else ([], _NONE, -1)

    def _published(self, slot: int, source: int, near: list[Any], publish: bool) -> tuple[Any, Any]:
        """What a pass writes for the neighbours, and what they saw last of what it mixes."""
        link = self.communication
        if not link.carries_values:
            return None, self.before if near else None
        # What is under way must not be written.
        p = link.published if publish and slot >= 0 and not self._walk.is_under_way else None
        q = link.previous if source >= 0 else None
        return (p, q) if self._is_one else (self._part(p, slot), self._part(q, source))

    def _part(self, buffer: Any, slot: int) -> Any:
        """The part of a published buffer that a sent vector has."""
        size = self.arena.size
        if isinstance(buffer, np.ndarray):
            return buffer[slot * size : (slot + 1) * size]
        return None if buffer is None else buffer + slot * size * self._wire_bytes

    def _segments(
        self,
        gradient: bool | str,
        factor: NDArray[np.float64] | float,
        moved: bool,
        *,
        has_q: bool,
    ) -> NDArray[np.void]:
        if gradient is True and self._gradient is not None and self._torch is None:
            segments = self._gradient
        else:
            segments = self.arena.mix_only_segments()
            if isinstance(gradient, str):
                self._point_at(segments, gradient)
            elif gradient and self._torch is not None:
                segments["own"] = has_q  # neighbours are compared with the old x, as published
        if moved:
            segments["own"] = 1
        if not has_q and self.communication.carries_values:
            segments = segments.copy()
            segments["own"] = 0
        (scale,) = per_agent(factor, 1)
        if self._torch is not None:
            self._walk.leaves_it_to_torch(gradient, scale)
        if scale != 1:
            segments = segments.copy()
            segments["alpha"] *= scale
        return segments

    def _point_at(self, segments: NDArray[np.void], vector: str) -> None:
        """Have the vector in the gradient's place, with the groups' step sizes."""
        rows = segments[: len(self.arena.parameters)]
        rows["grad"] = self._flat(vector).data_ptr() + 4 * rows["offset"]
        rows["grad"][rows["length"] == 0] = 0
        rows["alpha"] = [one.alpha for one in self.coefficients]
        rows["decay"] = rows["mu"] = rows["c_v"] = 0.0
        rows["c_g"] = 1.0

    def _mail_has_come(self, x_D: torch.Tensor, weight: float) -> None:
        self.algorithm.mail(self, x_D.view(1, -1), weight)
        if not self._is_busy:  # between two steps
            self._outcomes.extend(Passes(self.steps, made) for made in self._made)
            self._made = []

    def _post(self) -> None:
        """Show what was written; what is read with it is mixed by the matrix of this turn."""
        self._walk.posts(self.steps)
        self.communication.post(self.steps, self._walk.round, self._walk.turn, self._sent_numbers)

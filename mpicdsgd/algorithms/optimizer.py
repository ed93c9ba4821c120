"""The torch front: what every algorithm's optimizer shares.

An algorithm (a file beside this one) says by its `step` what is published, received and updated;
the steps and hooks of a torch optimizer are here, its state in `optimizer_state`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.algorithms.measured import Measured
from mpicdsgd.algorithms.optimizer_state import OpenOptimizer
from mpicdsgd.comm.exchange.header import Reason
from mpicdsgd.common.errors import UserError


class AgentOptimizer(OpenOptimizer):
    """A decentralised optimizer: an algorithm, its communication and a local step, composed.

    `named` has the optimizers by their names, as `mpicdsgd.CDSGD`, and
    `any_algorithm.optimizer` makes one of any algorithm.

    Making one, `step`, `publish`, `mix`, `load_state_dict`, `add_param_group` and `close` are
    collective over ``agents``: all agents call them alike and in the same order.

    Args:
        params: as for any torch optimizer; float32 on ``agents.device``.
        algorithm: what a step is; its settings have the hyperparameters of a group.
        agents: who to exchange with.
        torch_step: a torch optimizer's step in the place of the fused one.
        server: the job's, where the algorithm needs one.
        buffers: float32 tensors without gradient that are mixed too (BatchNorm's statistics).
        exchange: transport, wire type and timeout.
        debug: find writes through ``.data`` too, by a checksum of all parameters each step.

    Attributes:
        arena: the flat memory of the parameters.
        exchange: the open communication.
        context: what both are at work in.

    Raises:
        UserError: on every rank, for hyperparameters out of range or models that differ.
    """

    # torch.amp.GradScaler then leaves it to `step` to unscale gradients and to heed an overflow,
    # and never skips a step, which is collective. It sets the two others around a step only.
    _step_supports_amp_scaling = True
    found_inf: torch.Tensor
    grad_scale: torch.Tensor | None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Mix with the neighbours and take one gradient step. Collective.

        Where `torch.amp.GradScaler` found an overflow, this agent alone leaves its gradient out:
        x <- mix, v kept. On a GPU nothing waits for it; what a pass finds not to be finite is
        reported two steps later.

        Raises:
            AgentFault: on all agents at the same step, if one found a fault (parameters changed
                by hand or not finite) at most the graph's diameter + 1 steps ago.
            ExchangeError: if a neighbour is missing, left or out of step.
            RuntimeError: if no parameter has a new gradient, or one left the arena for good.
        """
        if self._torch is not None:
            return self._step_by_torch(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._begin()
        self.arena.require_fresh_gradients()
        scale, overflow = self._from_scaler()
        self.exchange.complete_gradients()
        self._fill_segments()
        self.context.advance(self.arena.segments, scale, overflow)
        return loss

    def _step_by_torch(self, closure: Callable[[], Any] | None) -> Any:
        """The torch optimizer's own step, then the algorithm's."""
        local, context = self._torch, self.context
        assert local is not None
        self._begin()
        self.exchange.complete_gradients()
        penalty = local.penalty(self.arena) if context.measuring else None
        scale, overflow = self._from_scaler()
        if not self.exchange.carries_values:
            context.keep_x()
        loss = local.apply(self.arena, closure, scale, overflow)
        self.arena.require_fresh_gradients()
        beside = None if penalty is None else local.beside(self.arena, penalty)
        context.advance(None, overflow=overflow, beside=beside)
        return loss

    def _fill_segments(self) -> None:
        self.context.coefficients = coefficients = list(self._coefficients_per_tensor())
        self.arena.fill_segments(coefficients)

    @torch.no_grad()
    def mix(self) -> None:
        """A step without this agent's gradient: x <- sum_l Pi[j,l] x_l, v kept. Collective.

        Where gradients are everybody's mean, the others' are applied; as `step`.
        """
        self._begin()
        segments = None
        if self.exchange.averages_gradients:
            self.zero_grad(set_to_none=True)
            self.exchange.complete_gradients()
        self._fill_segments()  # the present coefficients
        if self.exchange.averages_gradients:
            segments = self.arena.segments
        elif not self.exchange.carries_values and self._torch is not None:
            self.context.keep_x()
        self.context.advance(segments)
        self._opt_called = True  # else torch's schedulers warn that no step was made before theirs

    @torch.no_grad()
    def publish(self) -> None:
        """Show the neighbours parameters that were changed by hand. Collective.

        With look-ahead momentum the values in the model are y, and x becomes y - mu v.
        """
        self._require_open()
        self.context.withdraw()
        self.arena.repair()
        self.settle()
        if self.context.ahead is not None:
            self.context.ahead.copy_(self.arena.flat)
            if self._v_views:
                for i, coefficients in enumerate(self._coefficients_per_tensor()):
                    self._x_views[i].sub_(self._v_views[i], alpha=coefficients.mu)
        self.context.begin()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """A block in which the model holds x, to evaluate or save it. Local.

        With look-ahead momentum the model otherwise holds x + mu v. What the block writes into the
        parameters is lost then; elsewhere this does nothing.
        """
        if self._is_open:
            self._begin()
            self.settle()
        if self.context.ahead is None:
            yield
            return
        with self.holding(self.context.ahead):
            yield

    @contextlib.contextmanager
    def holding(self, values_D: torch.Tensor) -> Iterator[None]:
        """A block in which the model holds ``values_D``, laid out as `x`. Local."""
        kept = self.arena.flat.clone()
        self.arena.flat.copy_(values_D)
        self.arena.written()
        try:
            yield
        finally:
            self.arena.flat.copy_(kept)
            self.arena.written()

    def request_stop(self) -> None:
        """Have all agents stop after the same step (see `stopping`). Local."""
        self.exchange.request_stop()

    def report(self, reason: Reason) -> None:
        """Have all agents raise `AgentFault` after the same step. Local."""
        self.exchange.report(reason)

    @property
    def skipped_means_fault(self) -> bool:
        """Whether a gradient that a step left out (``found_inf``) is a loss that is no number.

        For who sets ``found_inf`` without a scaler: all agents then raise it, as `report` says.
        """
        return self.context.skipped_means_fault

    @skipped_means_fault.setter
    def skipped_means_fault(self, value: bool) -> None:
        self.context.skipped_means_fault = value

    def measure(self) -> None:
        """Have each step from now on measure itself, for `measured`. Local.

        It costs little, and changes no bit of the parameters.

        Raises:
            UserError: for an algorithm that mixes by no matrix.
        """
        if not self.exchange.carries_values:
            raise UserError(f"{self._label} has no disagreement to measure: it mixes by no matrix")
        self.context.measuring = True

    def measured(self) -> list[Measured]:
        """What the steps since the last call measured, in order; waits for a GPU. Local."""
        self.settle()
        measured, self.context.measured = self.context.measured, []
        return measured

    @property
    def stopping(self) -> bool:
        """Whether all agents are to stop now; true on all after the same step."""
        return self.exchange.stop_step <= self.steps

    @property
    def takes_part(self) -> bool:
        """Whether this agent is to compute a gradient now; where not, it calls `mix`. Local."""
        return self.algorithm.takes_part(self.steps, self.agents.rank)

    def centre(self) -> torch.Tensor | None:
        """The model beside the agents' own, shape (D,), if there is one. Collective, at rest."""
        return self.exchange.centre()

    def rest(self) -> None:
        """Bring everything under way to its end, before other collectives. Collective.

        With algorithms that are asynchronous or have a server the agents meet here, after the same
        number of steps; `arrays` and `state_dict` are then up to date. With others it does nothing.
        """
        self._require_open()
        self.exchange.rest()

    @property
    def x(self) -> NDArray[np.float32]:
        """This agent's parameters (and mixed buffers), shape (D,), on the host: not to be written.

        A view, or a copy of what is on a GPU.
        """
        x: NDArray[np.float32] = self.context.x.cpu().numpy()
        return x

    def _from_scaler(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """``grad_scale`` and ``found_inf``, where somebody has set them for this step."""
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)

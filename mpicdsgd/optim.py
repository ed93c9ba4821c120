"""The torch front: what every algorithm's optimizer shares.

An `AgentOptimizer` owns the arena, the exchange and the step counter. An algorithm (a file in
`mpicdsgd.algorithms`) says by `coefficients` what the one fused pass computes:

    h   =  g + lambda x                                         g: minibatch gradient
    v  <-  mu v - alpha h
    x  <-  x + sum_{l != j} Pi[j,l] (p_l - p_j)  +  c_v v  -  c_g alpha h
    p_j <- x                                                    published for the next step

The exchange of step k is under way while the user computes the gradient of step k.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd import native
from mpicdsgd.agents import Agents
from mpicdsgd.arena import Arena, Coefficients
from mpicdsgd.errors import UserError
from mpicdsgd.exchange import AgentFault, Exchange, ExchangeConfig, Reason, open_exchange

log = logging.getLogger("mpicdsgd")


class AgentOptimizer(torch.optim.Optimizer):
    """Base of the decentralised optimizers; use one of `mpicdsgd.algorithms`.

    Making one, `step`, `publish`, `mix`, `load_state_dict`, `add_param_group` and `close` are
    collective over ``agents``: all agents call them alike and in the same order.

    Args:
        params: as for any torch optimizer; float32 on the CPU.
        defaults: hyperparameters of a group.
        agents: who to exchange with.
        rounds: mixing rounds tau per step (i-CDSGD, arXiv 1805.12120).
        buffers: float32 tensors without gradient that are mixed too (BatchNorm's statistics).
        exchange: transport, wire type and timeout.
        debug: find writes through ``.data`` too, by a checksum of all parameters each step.

    Attributes:
        steps: steps completed.
        arena: the flat memory of the parameters.
        exchange: the open exchange.

    Raises:
        UserError: on every rank, for hyperparameters out of range or models that differ.
    """

    look_ahead = False  # the arena holds y = x + mu v, a buffer of its own holds x
    has_momentum = False

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        agents: Agents,
        *,
        rounds: int = 1,
        buffers: Iterable[torch.Tensor] = (),
        exchange: ExchangeConfig | None = None,
        debug: bool = False,
    ) -> None:
        self.agents = agents
        self.steps = 0
        self._is_open = False
        self._rounds = rounds
        self._buffers = list(buffers)
        self._config = exchange or ExchangeConfig()
        self._debug = debug
        self._hooks: list[Any] = []
        super().__init__(params, defaults)
        self._open()

    def coefficients(self, group: dict[str, Any]) -> Coefficients:
        """The update's coefficients for a parameter group at this step. Local."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Mix with the neighbours and take one gradient step. Collective.

        Raises:
            AgentFault: on all agents at the same step, if one found a fault (parameters changed
                by hand or not finite) at most the graph's diameter + 1 steps ago.
            ExchangeError: if a neighbour is missing, left or out of step.
            RuntimeError: if no parameter has a new gradient, or one left the arena for good.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._begin()
        self.arena.require_fresh_gradients()
        self.arena.fill_segments(list(self._coefficients_per_tensor()))
        self._advance(self.arena.segments)
        return loss

    @torch.no_grad()
    def mix(self) -> None:
        """A step without gradient: x <- sum_l Pi[j,l] x_l, v kept. Collective, as `step`."""
        self._begin()
        self._advance(self.arena.mix_only_segments())

    @torch.no_grad()
    def publish(self) -> None:
        """Show the neighbours parameters that were changed by hand. Collective.

        With look-ahead momentum the values in the model are y, and x becomes y - mu v.
        """
        self._require_open()
        self.exchange.wait(self.steps)
        self.arena.repair()
        if self._x is not None:
            self._x.copy_(self.arena.flat)
            if self._v is not None:
                for i, coefficients in enumerate(self._coefficients_per_tensor()):
                    self._x_views[i].sub_(self._v_views[i], alpha=coefficients.mu)
        self._publish()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """A block in which the model holds x, to evaluate or save it. Local.

        With look-ahead momentum the model otherwise holds x + mu v. What the block writes into the
        parameters is lost then; elsewhere this does nothing.
        """
        if self._is_open:
            self._begin()
        if self._x is None:
            yield
            return
        with self.holding(self._x):
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
    def stopping(self) -> bool:
        """Whether all agents are to stop now; true on all after the same step."""
        return self.exchange.stop_step <= self.steps

    @property
    def x(self) -> NDArray[np.float32]:
        """This agent's parameters (and mixed buffers), shape (D,), a view: not to be written."""
        return self.arena.numpy if self._x is None else self._x.numpy()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The whole state but for `steps` and the groups: x, v, y of shape (D,); views. Local."""
        arrays: dict[str, NDArray[Any]] = {"x": self.x}
        if self._v is not None:
            arrays["v"] = self._v.numpy()
        if self._x is not None:
            arrays["y"] = self.arena.numpy
        return arrays

    @torch.no_grad()
    def load_arrays(self, steps: int, arrays: dict[str, NDArray[Any]]) -> None:
        """Take over what `arrays` gave after ``steps`` steps, and publish it. Collective."""
        self._require_open()
        self.exchange.wait(self.steps)
        for name, array in AgentOptimizer.arrays(self).items():
            array[:] = arrays[name]
        self.arena.written()
        self.steps = steps
        self._publish()

    def state_dict(self) -> dict[str, Any]:
        """As for any torch optimizer, with ``agents.steps`` beside. Local.

        Momentum is under "v" and contains the step size: v = -lr * torch's momentum_buffer where
        lr never changed. Look-ahead's x is under "x".
        """
        return {**super().state_dict(), "agents": {"steps": self.steps}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict` into the arena and publish the parameters as they are. Collective.

        Load the model's own ``state_dict`` first, as with torch.
        """
        self._require_open()
        super().load_state_dict(state_dict)  # torch may refuse it: before anything collective
        self.exchange.wait(self.steps)
        self.arena.repair()
        for i, (parameter, coefficients) in enumerate(
            zip(self.arena.parameters, self._coefficients_per_tensor(), strict=True)
        ):
            loaded = self.state[parameter]
            if self._v_views:
                self._v_views[i].copy_(loaded.get("v", torch.zeros(())))
            if self._x_views:
                # The model may have been saved as x or as y = x + mu v: x and v settle it.
                x = loaded.get("x", self.arena.views[i])
                self._x_views[i].copy_(x)
                self.arena.views[i].copy_(self._x_views[i] + coefficients.mu * self._v_views[i])
        self._fill_state()
        self.steps = int(state_dict.get("agents", {}).get("steps", 0))
        self._publish()

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, making the arena and the exchange anew. Collective."""
        if not hasattr(self, "exchange"):
            super().add_param_group(param_group)
            return
        self._begin()
        momentum = {p: s["v"].clone() for p, s in self.state.items() if "v" in s}
        ahead = {p: s["x"].clone() for p, s in self.state.items() if "x" in s}
        stop_wanted = self.exchange.stop_wanted
        self.close()
        super().add_param_group(param_group)
        self._open()
        if stop_wanted:
            self.exchange.request_stop()
        for values, name in ((momentum, "v"), (ahead, "x")):
            for parameter, value in values.items():
                self.state[parameter][name].copy_(value)
        self.exchange.wait(self.steps)
        self._publish()

    def close(self) -> None:
        """Complete the exchange under way and end it. Collective; a second call does nothing.

        The parameters stay valid. At exit it happens by itself.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._is_open:
            self._is_open = False
            self.exchange.close()
            if self.exchange.fault.reason:
                raise AgentFault(self.exchange.fault)

    def __enter__(self) -> AgentOptimizer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an exception the others may not come to close(): leave it to the exit hooks.
        if kind is None:
            self.close()

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise TypeError("an optimizer with an open exchange cannot be copied: use state_dict()")

    def __reduce__(self) -> NoReturn:
        raise TypeError("an optimizer with an open exchange cannot be pickled: use state_dict()")

    def _open(self) -> None:
        agents = self.agents
        with agents.agreement("the optimizer's arguments"):
            if self._rounds < 1:
                raise UserError(f"rounds (tau) must be at least 1, got {self._rounds}")
            self.arena = Arena([p for g in self.param_groups for p in g["params"]], self._buffers)
            for group in self.param_groups:
                self.coefficients(group)
        agents.require_same(
            "the optimizer's parameters (shapes, order), algorithm and rounds",
            repr((type(self).__name__, self.arena.layout(), self._rounds, self.look_ahead)),
        )
        self.exchange: Exchange = open_exchange(agents, self.arena.size, self._config)
        self._weights = np.array(agents.weights, dtype=np.float32)
        flat = self.arena.flat
        self._v = torch.zeros_like(flat) if self.has_momentum else None
        self._x = flat.clone() if self.look_ahead else None
        self._scratch = np.empty_like(self.arena.numpy) if self._rounds > 1 else None
        self._v_views = [] if self._v is None else self.arena.views_of(self._v)
        self._x_views = [] if self._x is None else self.arena.views_of(self._x)
        self._fill_state()
        for parameter in self.arena.parameters:
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    self._progress
                )
                self._hooks.append(hook)
        self._is_open = True
        self._publish()

    def _fill_state(self) -> None:
        for views, name in ((self._v_views, "v"), (self._x_views, "x")):
            for parameter, view in zip(self.arena.parameters, views, strict=False):
                self.state[parameter][name] = view

    def _progress(self, _: torch.Tensor) -> None:
        self.exchange.progress()

    def _require_open(self) -> None:
        if not self._is_open:
            raise RuntimeError("the optimizer was closed: make a new one to go on training")

    def _coefficients_per_tensor(self) -> Iterator[Coefficients]:
        for group in self.param_groups:
            coefficients = self.coefficients(group)
            yield from (coefficients for _ in group["params"])

    def _begin(self) -> None:
        """Find out whether the parameters are still ours and as we left them."""
        self._require_open()
        moved = self.arena.repair()
        written = self.arena.changed() or (self._debug and self._checksum != self.arena.checksum())
        if moved or written:
            log.error(
                "agent %d: parameters were changed outside step() since they were last published; "
                "all agents will stop",
                self.agents.rank,
            )
            self.exchange.report(Reason.CHANGED_BY_HAND)
            self._accept()
        self._take_buffers()

    def _take_buffers(self) -> None:
        """What the forward pass made of mixed buffers, it made in the arena: x has them too."""
        if self._x is not None:
            end = self.arena.parameters_end
            self._x[end:] = self.arena.flat[end:]

    def _accept(self) -> None:
        self.arena.accept()
        self._checksum = self.arena.checksum() if self._debug else 0

    def _advance(self, segments: NDArray[np.void]) -> None:
        """Wait, pass, post: ``rounds`` times; the gradient is applied in the last round."""
        z = self.x
        for mixing_round in range(self._rounds - 1):
            assert self._scratch is not None
            neighbours = self.exchange.wait(self.steps, mixing_round)
            self._pass(self._scratch, z, neighbours, self.arena.mix_only_segments(), last=False)
            self.exchange.post(self.steps, mixing_round + 1)
            z = self._scratch
        neighbours = self.exchange.wait(self.steps, self._rounds - 1)
        finite = self._pass(self.x, z, neighbours, segments, last=True)
        self.arena.written()
        self._accept()
        if not finite:
            self.exchange.report(Reason.NON_FINITE)
        self.steps += 1
        self.exchange.post(self.steps)
        if self.exchange.fault.step <= self.steps:
            self.exchange.fault_raised = True
            raise AgentFault(self.exchange.fault)

    def _pass(
        self,
        out: NDArray[np.float32],
        z: NDArray[np.float32],
        neighbours: list[NDArray[np.generic]],
        segments: NDArray[np.void],
        *,
        last: bool,
    ) -> bool:
        return native.update(
            out,
            z,
            at=self.arena.numpy,
            v=self._v.numpy() if last and self._v is not None else None,
            y=self.arena.numpy if last and self._x is not None else None,
            p=self.exchange.published,
            q=self.exchange.previous,
            neighbours=neighbours,
            weights=self._weights[: len(neighbours)],
            segments=segments,
            wire=self._config.wire,
            threads=torch.get_num_threads(),
        )

    def _publish(self) -> None:
        """Write p <- Q(x) and post; the exchange must be free."""
        self._take_buffers()
        if not self._pass(self.x, self.x, [], self.arena.mix_only_segments(), last=False):
            self.exchange.report(Reason.NON_FINITE)
        self._accept()
        self.exchange.post(self.steps)

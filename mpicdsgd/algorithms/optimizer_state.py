"""An optimizer's memory: its arena and exchange, opened, saved, loaded and closed.

`optim` has what is done with it in a step.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, Self

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.algorithms.stepper import Stepper
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.exchange.errors import AgentFault
from mpicdsgd.comm.exchange.exchange import Exchange
from mpicdsgd.comm.exchange.opening import ExchangeConfig, open_exchange
from mpicdsgd.comm.links.link import Link
from mpicdsgd.common.errors import UserError
from mpicdsgd.kernels.arena import Arena, Coefficients


def _plain(name: str) -> Any:
    """A method of torch's Optimizer without its wrapper.

    That imports torch's compiler at the first call, to keep it away from the method: as many files
    and seconds again as torch itself, on every rank.
    """
    return inspect.unwrap(getattr(torch.optim.Optimizer, name))


class OpenOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose parameters lie in an arena that neighbours see through an exchange.

    Making one, `load_arrays`, `load_state_dict`, `add_param_group` and `close` are collective over
    ``agents``: all agents call them alike and in the same order. Arguments, attributes and what is
    raised: see `mpicdsgd.algorithms.optimizer.AgentOptimizer`.
    """

    look_ahead = False  # the arena holds y = x + mu v, a buffer of its own holds x
    has_momentum = False
    zero_grad = _plain("zero_grad")

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

    def open_exchange(self) -> tuple[Exchange | Link, list[NDArray[np.float32]]]:
        """What is exchanged and how, and the weights of what comes, by turn. Collective."""
        self.agents.remark((*self.agents.graph.remarks, *self.agents.mixing.remarks))
        weights = [np.array(turn.weights, np.float32) for turn in self.agents.turns]
        return open_exchange(self.agents, self.arena.size, self._config), weights

    @property
    def steps(self) -> int:
        """Steps completed."""
        return self.stepper.steps

    def settle(self) -> None:
        """Learn what became of all passes so far, waiting for a GPU. Local."""
        self.stepper.settle()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The whole state but for `steps` and the groups: x, v, y of shape (D,). Local.

        On the host, and not to be written: views, or copies of what is on a GPU.
        """
        return {name: flat.cpu().numpy() for name, flat in self._flats().items()}

    @torch.no_grad()
    def load_arrays(self, steps: int, arrays: dict[str, NDArray[Any]]) -> None:
        """Take over what `arrays` gave after ``steps`` steps, and publish it. Collective."""
        self._require_open()
        self.exchange.withdraw(self.steps)
        self.settle()
        for name, flat in self.stepper.flats().items():
            flat.copy_(torch.from_numpy(np.ascontiguousarray(arrays[name])))
        self.exchange.load({name: arrays[f"link/{name}"] for name in self.exchange.arrays()})
        self.arena.written()
        self.stepper.steps = steps
        self.stepper.publish()

    def state_dict(self) -> dict[str, Any]:
        """As for any torch optimizer, with ``agents.steps`` beside. Local.

        Momentum is under "v" and contains the step size: v = -lr * torch's momentum_buffer where
        lr never changed. Look-ahead's x is under "x".
        """
        more = {name: values.clone() for name, values in self.exchange.arrays().items()}
        return {**_plain("state_dict")(self), "agents": {"steps": self.steps, "link": more}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict` into the arena and publish the parameters as they are. Collective.

        Load the model's own ``state_dict`` first, as with torch.
        """
        self._require_open()
        _plain("load_state_dict")(
            self, state_dict
        )  # torch may refuse it: before anything collective
        self.exchange.withdraw(self.steps)
        self.settle()
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
        link = state_dict.get("agents", {}).get("link", {})
        if link:
            self.exchange.load({name: values.cpu().numpy() for name, values in link.items()})
        self.stepper.steps = int(state_dict.get("agents", {}).get("steps", 0))
        self.stepper.publish()

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, making the arena and the exchange anew. Collective."""
        if not hasattr(self, "exchange"):
            _plain("add_param_group")(self, param_group)
            return
        self._begin()
        momentum = {p: s["v"].clone() for p, s in self.state.items() if "v" in s}
        ahead = {p: s["x"].clone() for p, s in self.state.items() if "x" in s}
        stop_wanted, steps = self.exchange.stop_wanted, self.steps
        before = self.stepper
        self.close()
        _plain("add_param_group")(self, param_group)
        self._open(steps)
        for name in ("skipped_means_fault", "measuring", "measured"):
            setattr(self.stepper, name, getattr(before, name))
        if stop_wanted:
            self.exchange.request_stop()
        for values, name in ((momentum, "v"), (ahead, "x")):
            for parameter, value in values.items():
                self.state[parameter][name].copy_(value)
        self.exchange.withdraw(self.steps)
        self.stepper.publish()

    def close(self) -> None:
        """Complete the exchange under way and end it. Collective; a second call does nothing.

        The parameters stay valid. At exit it happens by itself.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._is_open:
            self._is_open = False
            self.stepper.close()
            if self.exchange.fault.reason:
                raise AgentFault(self.exchange.fault)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an exception the others may not come to close(): leave it to the exit hooks.
        if kind is None:
            self.close()

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise TypeError("an optimizer with an open exchange cannot be copied: use state_dict()")

    def __reduce__(self) -> NoReturn:
        raise TypeError("an optimizer with an open exchange cannot be pickled: use state_dict()")

    def _open(self, steps: int = 0) -> None:
        agents = self.agents
        with agents.agreement("the optimizer's arguments"):
            if self._rounds < 1:
                raise UserError(f"rounds (tau) must be at least 1, got {self._rounds}")
            parameters = [p for g in self.param_groups for p in g["params"]]
            self.arena = Arena(parameters, self._buffers, agents.device)
            for group in self.param_groups:
                self.coefficients(group)
        agents.require_same(
            "the optimizer's parameters (shapes, order), algorithm and rounds",
            repr((type(self).__name__, self.arena.layout(), self._rounds, self.look_ahead)),
        )
        exchange, weights = self.open_exchange()
        self.stepper = Stepper(
            agents,
            self.arena,
            exchange,
            weights,
            self._config,
            rounds=self._rounds,
            has_momentum=self.has_momentum,
            look_ahead=self.look_ahead,
            debug=self._debug,
        )
        self.stepper.steps = steps
        self.exchange = exchange
        v, ahead = self.stepper.v, self.stepper.ahead
        self._v_views = [] if v is None else self.arena.views_of(v)
        self._x_views = [] if ahead is None else self.arena.views_of(ahead)
        self._fill_state()
        for parameter in self.arena.parameters:
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    self._progress
                )
                self._hooks.append(hook)
        self._is_open = True
        self.stepper.publish()

    def _fill_state(self) -> None:
        for views, name in ((self._v_views, "v"), (self._x_views, "x")):
            for parameter, view in zip(self.arena.parameters, views, strict=False):
                self.state[parameter][name] = view

    def _flats(self) -> dict[str, torch.Tensor]:
        """The whole state but for `steps`: x, v, y, and an algorithm's own below "link"."""
        link = {f"link/{name}": values for name, values in self.exchange.arrays().items()}
        return {**self.stepper.flats(), **link}

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
        self._require_open()
        self.stepper.begin()

"""An optimizer's memory: its arena and communication, opened, saved, loaded and closed.

`optimizer` has what is done with it in a step.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, Self

import torch
from numpy.typing import NDArray

from mpicdsgd.algorithms.context import AgentContext
from mpicdsgd.algorithms.contract import Algorithm
from mpicdsgd.algorithms.opening import open_communication
from mpicdsgd.algorithms.server.server import Server
from mpicdsgd.algorithms.torch_step import NOTHING, TorchStep
from mpicdsgd.algorithms.walk import check_declared
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.communication import Communication
from mpicdsgd.comm.exchange.errors import AgentFault
from mpicdsgd.comm.exchange.opening import ExchangeConfig
from mpicdsgd.common.errors import UserError
from mpicdsgd.kernels.arena import Arena
from mpicdsgd.kernels.coefficients import Coefficients


def plain(name: str) -> Any:
    """A method of torch's Optimizer without its wrapper.

    That imports torch's compiler at the first call, to keep it away from the method: as many files
    and seconds again as torch itself, on every rank.
    """
    return inspect.unwrap(getattr(torch.optim.Optimizer, name))


class OpenOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose parameters lie in an arena, with a communication opened for it.

    Making one, `load_arrays`, `load_state_dict`, `add_param_group` and `close` are collective over
    ``agents``: all agents call them alike and in the same order. Arguments, attributes and what is
    raised: see `optimizer.AgentOptimizer`.
    """

    zero_grad = plain("zero_grad")
    context: AgentContext

    def __init__(
        self,
        params: Any,
        algorithm: Algorithm,
        agents: Agents,
        *,
        torch_step: TorchStep | None = None,
        server: Server | None = None,
        buffers: Iterable[torch.Tensor] = (),
        exchange: ExchangeConfig | None = None,
        debug: bool = False,
    ) -> None:
        self.algorithm, self.agents = algorithm, agents
        # As a run's log calls it; the classes for scripts have names of their own.
        name = type(self).__name__
        self._label = algorithm.name or type(algorithm).__name__ if name == _GENERIC else name
        self._torch, self._server = torch_step, server
        self._is_open = False
        self._buffers = list(buffers)
        self._config = exchange or ExchangeConfig()
        self._debug = debug
        self._hooks: list[Any] = []
        self._known: dict[tuple[Any, ...], Coefficients] = {}
        settings = algorithm.settings
        self._groups_have = [
            f.name for f in dataclasses.fields(settings) if f.metadata.get("per_group")
        ]
        defaults = {name: getattr(settings, name) for name in self._groups_have}
        if torch_step is not None:
            defaults = dict(torch_step.optimizer.defaults)
        super().__init__(params, defaults)
        self._open()

    @property
    def steps(self) -> int:
        """Steps completed."""
        return self.context.steps

    @property
    def exchange(self) -> Communication:
        """What the algorithm communicates over, open."""
        return self.context.communication

    def settle(self) -> None:
        """Learn what became of all passes so far, waiting for a GPU. Local."""
        self.context.settle()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The whole state but for `steps` and the groups: x, v, y of shape (D,), and others. Local.

        On the host, and not to be written: views, or copies of what is on a GPU. An algorithm's own
        vectors and numbers are below "link/", a torch optimizer's state below "optimizer/".
        """
        arrays = {name: flat.cpu().numpy() for name, flat in self.context.flats.items()}
        more = {} if self._torch is None else self._torch.arrays(self.arena)
        return arrays | more

    @torch.no_grad()
    def load_arrays(self, steps: int, arrays: dict[str, NDArray[Any]]) -> None:
        """Take over what `arrays` gave after ``steps`` steps, and publish it. Collective."""
        self._require_open()
        self.context.withdraw()
        self.settle()
        if self._torch is not None:
            self._torch.load(self.arena, arrays)
        self.context.load(arrays)
        self.arena.written()
        self.context.steps = steps
        self.context.begin()

    def state_dict(self) -> dict[str, Any]:
        """As for any torch optimizer, with ``agents.steps`` beside. Local.

        Momentum is under "v" and contains the step size: v = -lr * torch's momentum_buffer where
        lr never changed. Look-ahead's x is under "x".
        """
        if self._torch is not None:
            return {**self._torch.optimizer.state_dict(), "agents": self._beside()}
        return {**plain("state_dict")(self), "agents": self._beside()}

    def _beside(self) -> dict[str, Any]:
        prefix = "link/"
        own = {n: f for n, f in self.context.flats.items() if n.startswith(prefix)}
        link = {n.removeprefix(prefix): flat.clone() for n, flat in own.items()}
        return {"steps": self.steps, "link": link}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict` into the arena and publish the parameters as they are. Collective.

        Load the model's own ``state_dict`` first, as with torch.
        """
        self._require_open()
        # torch may refuse it: before anything collective
        if self._torch is None:
            plain("load_state_dict")(self, state_dict)
        else:
            self._torch.optimizer.load_state_dict(state_dict)
            self.param_groups = self._torch.optimizer.param_groups
        self.context.withdraw()
        self.settle()
        self.arena.repair()
        if self._torch is None:
            self._load_momentum()
        self._fill_state()
        beside = state_dict.get("agents", {})
        if link := beside.get("link", {}):
            x = {name: f.cpu().numpy() for name, f in self.context.flats.items() if "/" not in name}
            own = {f"link/{name}": values.cpu().numpy() for name, values in link.items()}
            self.context.load(x | own)
        self.context.steps = int(beside.get("steps", 0))
        self.context.begin()

    def _load_momentum(self) -> None:
        """v and x from what torch has loaded into `state`."""
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

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, making the arena and the communication anew. Collective."""
        if not hasattr(self, "context"):
            plain("add_param_group")(self, param_group)
            return
        self._begin()
        before, kept = self.context, self._per_parameter()
        numbers = {name: before.number(name).copy() for name in self.algorithm.numbers}
        stop_wanted, steps = self.exchange.stop_wanted, self.steps
        self.close()
        plain("add_param_group")(self, param_group)
        self._open(steps)
        for name in ("skipped_means_fault", "measuring", "measured"):
            setattr(self.context, name, getattr(before, name))
        if stop_wanted:
            self.exchange.request_stop()
        for name, values in numbers.items():
            self.context.number(name)[:] = values
        now = self._per_parameter()
        for parameter, flats in kept.items():
            for name, value in flats.items():
                now[parameter][name].copy_(value)
        self.context.withdraw()
        self.context.begin()

    def _per_parameter(self) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
        """Views of all vectors but x and y by parameter; copies stay after `close`."""
        flats = self.context.flats
        names = [n for n, f in flats.items() if n != "y" and f.shape == self.arena.flat.shape]
        if self.context.ahead is None:
            names.remove("x")
        views = {name: self.arena.views_of(flats[name]) for name in names}
        return {
            parameter: {name: views[name][i] for name in names}
            for i, parameter in enumerate(self.arena.parameters)
        }

    def close(self) -> None:
        """Complete the exchange under way and end it. Collective; a second call does nothing.

        The parameters stay valid. At exit it happens by itself.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._is_open:
            self._is_open = False
            self.context.close()
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
        agents, algorithm = self.agents, self.algorithm
        torch_is_local = self._torch is not None
        with agents.agreement(f"{self._label}()"):
            algorithm.check(agents.size)
            check_declared(algorithm)
            if torch_is_local and algorithm.posts > 1:
                raise UserError(
                    f"{self._label} with a torch optimizer mixes once in a step, after the "
                    f"optimizer's own: rounds = 1, got {algorithm.posts}"
                )
            if torch_is_local and not algorithm.any_local_step:
                raise UserError(
                    f"{self._label} makes its own step with the gradient: a torch optimizer cannot "
                    "stand in its place"
                )
            if self._buffers and not algorithm.mixes_buffers:
                raise UserError(
                    f"{self._label} exchanges gradients, which buffers do not have: with it, "
                    'model.buffers = "local"'
                )
        agents.require_same(f"{self._label}'s arguments", repr(self._shared_settings()))
        with agents.agreement("the optimizer's arguments"):
            parameters = [p for g in self.param_groups for p in g["params"]]
            self.arena = Arena(parameters, self._buffers, agents.device)
            list(self._coefficients_per_tensor())
        agents.require_same(
            "the optimizer's parameters (shapes, order) and algorithm",
            repr((self._label, self.arena.layout())),
        )
        communication = open_communication(
            algorithm, self._label, agents, self.arena, self._config, self._server
        )
        self.context = AgentContext(
            agents, self.arena, algorithm, communication, self._config,
            torch_step=self._torch, debug=self._debug,
        )  # fmt: skip
        self.context.steps = steps
        v, ahead = self.context.v, self.context.ahead
        self._v_views = [] if v is None else self.arena.views_of(v)
        self._x_views = [] if ahead is None else self.arena.views_of(ahead)
        self._fill_state()
        for parameter in self.arena.parameters:
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    communication.ready
                )
                self._hooks.append(hook)
        self._is_open = True
        self.context.begin()

    def _shared_settings(self) -> tuple[Any, ...]:
        """What must be the same on all agents: all but the groups' hyperparameters."""
        run, settings = self.algorithm.run, self.algorithm.settings
        own = {
            f.name: getattr(settings, f.name)
            for f in dataclasses.fields(settings)
            if f.name not in self._groups_have
        }
        is_served = self._server is not None
        return own, run.seed, run.steps_per_epoch, run.shift, is_served

    def _fill_state(self) -> None:
        for views, name in ((self._v_views, "v"), (self._x_views, "x")):
            for parameter, view in zip(self.arena.parameters, views, strict=False):
                self.state[parameter][name] = view

    def _require_open(self) -> None:
        if not self._is_open:
            raise RuntimeError("the optimizer was closed: make a new one to go on training")

    def _coefficients_per_tensor(self) -> Iterator[Coefficients]:
        for group in self.param_groups:
            coefficients = NOTHING if self._torch is not None else self._coefficients(group)
            yield from (coefficients for _ in group["params"])

    def _coefficients(self, group: dict[str, Any]) -> Coefficients:
        """Of a group; checked when a hyperparameter changes, not in each step."""
        key = tuple(group[name] for name in self._groups_have)
        found = self._known.get(key)
        if found is None:
            if len(self._known) > 64:
                self._known.clear()
            found = self._known[key] = self.algorithm.settings.coefficients(group)
        return found

    def _begin(self) -> None:
        self._require_open()
        self.context.begin_step()


_GENERIC = "AgentOptimizer"

"""What an algorithm communicates over: one face for a graph's edges, sums, pairs, mail, a server.

`comm.exchange.exchange.Exchange` moves what is published along the edges of a graph;
`comm.links.assembly.Assembly` is what serves where no graph carries a stop or a fault: sums over
all agents, pairs, mail, and with `algorithms.server.client.Client` a server. How a stop and a fault
spread, how waiting is bounded and how all end is the same to whoever uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.comm.exchange.header import Fault, Reason


class Hooks(Protocol):
    """What a communication asks of who works over it."""

    def look(self) -> None:
        """What can be done while this agent waits for others, between two steps."""

    def rest(self) -> None:
        """All is at rest: check what must hold then. Collective."""

    def centre(self) -> torch.Tensor | None:
        """The model beside the agents' own, shape (D,). Collective, at rest."""


class NoHooks:
    """Of a communication that nobody works over, before and after."""

    def look(self) -> None:
        pass

    def rest(self) -> None:
        pass

    def centre(self) -> torch.Tensor | None:
        return None


class Quiet:
    """What a communication answers where there is nothing to do or to keep."""

    hooks: Hooks

    def begin(self, step: int) -> None:
        """Nothing: who works over it posts."""

    def after(self, step: int) -> None:
        """Nothing: headers say it."""

    def complete_gradients(self) -> None:
        """Nothing: gradients are each agent's own."""

    def ready(self, parameter: torch.Tensor) -> None:
        """Autograd has added a gradient: a moment to let MPI move data."""
        self.progress()

    def progress(self) -> bool:
        """Let MPI move data, for a moment; whether nothing is under way."""
        return True

    def arrays(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold: nothing, as the agents' vectors say all."""
        return {}

    def load(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Take over what `arrays` gave."""
        for name, tensor in self.arrays().items():
            tensor.copy_(torch.from_numpy(np.array(arrays[name])))

    def centre(self) -> torch.Tensor | None:
        """See `Hooks.centre`."""
        return self.hooks.centre()

    def look(self) -> None:
        """Nothing: what others wait for is under way by itself."""

    def meet(self) -> None:
        """Nothing: the agents are at most a few steps apart."""

    def rest(self) -> None:
        """Nothing: an exchange may stay under way whatever comes between two steps."""

    def abandon(self) -> None:
        """Nothing: a job ends with its first dead rank."""


class Communication(Protocol):
    """See the module. Making one is collective over the agents.

    Attributes:
        carries_values: whether passes publish into it and read from it; else they see none of it.
        averages_gradients: whether gradients are everybody's mean, and `complete_gradients` waits.
        hooks: who works over it.
        published, previous: what a pass fills before `post`, and what was published last.
        stop_step: after so many steps all agents stop, as far as known here.
        stops_within: steps from a request until all agents stop, at most.
        fault: the least fault known here; fault_raised: whether it has been raised already.
        wait_s, bytes_sent: totals since opening.
        before_closing: called when closing begins, also at exit: the last chance to `report`.
    """

    carries_values: bool
    averages_gradients: bool
    hooks: Hooks
    stops_within: int
    fault_raised: bool
    bytes_sent: int
    before_closing: Callable[[], None]

    @property
    def stop_step(self) -> int: ...

    @property
    def stop_wanted(self) -> bool: ...

    @property
    def fault(self) -> Fault: ...

    @property
    def fault_known(self) -> Fault: ...

    @property
    def wait_s(self) -> float: ...

    @property
    def published(self) -> Any: ...

    @property
    def previous(self) -> Any: ...

    def begin(self, step: int) -> None:
        """Parameters were given from outside, after ``step`` steps. Collective, at rest."""

    def post(
        self, step: int, mixing_round: int = 0, turn: int = 0, numbers: tuple[float, ...] = ()
    ) -> None:
        """Show `published`, and ``numbers`` beside it."""

    def wait(self, step: int, mixing_round: int = 0) -> list[Any]:
        """The neighbours' buffers, once all have come."""

    def numbers(self) -> list[tuple[float, ...]]:
        """What came beside the buffers that `wait` gave."""

    def after(self, step: int) -> None:
        """Step ``step`` is completed."""

    def complete_gradients(self) -> None:
        """Have everybody's mean in every ``.grad``. Collective, before every step."""

    def ready(self, parameter: torch.Tensor) -> None:
        """Autograd has added this backward's gradient of ``parameter``."""

    def withdraw(self, step: int) -> None:
        """Have nothing under way, as parameters are to be changed. Collective."""

    def rest(self) -> None:
        """Bring everything under way to its end, where agents go at their own pace. Collective."""

    def meet(self) -> None:
        """Have all agents here before they raise."""

    def look(self) -> None:
        """See `Hooks.look`. Local."""

    def progress(self) -> bool:
        """Let MPI move data, for a moment; whether nothing is under way. At any time. Local."""

    def request_stop(self) -> None:
        """Have all agents stop after the same step. Local, also in a signal handler."""

    def report(self, reason: Reason, at: int | None = None) -> None:
        """Have all agents raise the fault after the same step. Local."""

    def centre(self) -> torch.Tensor | None:
        """See `Hooks.centre`."""

    def arrays(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold of it, by name; written in place."""

    def load(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Take over what `arrays` gave; `begin` follows. Local."""

    def abandon(self) -> None:
        """End this agent's part when its communicators have been revoked, for good. Local."""

    def close(self) -> None:
        """End it. Collective; a second call does nothing. Raises AgentFault: see `fault`."""

    def drain(self) -> Iterator[None]:
        """`close`, yielding after every look; `shutdown` drains several at once."""

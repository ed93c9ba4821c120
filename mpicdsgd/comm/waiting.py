"""Waiting for other agents: for a while, counted, and with a message that says for whom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from mpicdsgd.comm import shutdown
from mpicdsgd.comm.agreement import Testable
from mpicdsgd.comm.exchange.errors import AgentMissing
from mpicdsgd.common.patience import Patience

_abandoned: list[Testable] = []  # kept, with their buffers: MPI may yet write into them


class Waiter:
    """Completes requests by looking at them now and then.

    Args:
        rank: this agent.
        timeout_s: how long to wait for anything, in seconds.

    Attributes:
        step: of this agent, for messages.
        wait_s: seconds waited so far.
        meanwhile: called between two looks, with the seconds waited for this request.
    """

    def __init__(self, rank: int, timeout_s: float) -> None:
        self._rank, self._timeout_s = rank, timeout_s
        self.step = 0
        self.wait_s = 0.0
        self.meanwhile: Callable[[float], None] = _nothing

    def wait(self, request: Testable, whom: str) -> None:
        """Complete ``request``.

        Raises:
            AgentMissing: it was not completed within the timeout.
            RuntimeError: in a forked child.
        """
        if not shutdown.is_rank():
            raise RuntimeError("this is a forked child process, which has no part in the exchange")
        start = time.perf_counter()
        for _ in self.looks(request, whom):
            pass
        self.wait_s += time.perf_counter() - start

    def looks(self, request: Testable, whom: str) -> Iterator[float]:
        """As `wait`, yielding the seconds waited after every look that found it not complete."""
        patience = Patience(self._timeout_s)
        while not request.Test():
            self.meanwhile(patience.waited_s)
            yield patience.waited_s
            if not patience.pause():
                _abandoned.append(request)
                raise AgentMissing(
                    f"agent {self._rank} waited {self._timeout_s:g} s after step {self.step} for "
                    f"{whom}; exchange.timeout_s sets the limit"
                )


class All:
    """Several requests as one."""

    def __init__(self, requests: list[Testable]) -> None:
        self._requests = requests

    def Test(self) -> bool:  # noqa: N802, MPI's own name
        self._requests = [request for request in self._requests if not request.Test()]
        return not self._requests


class Once:
    """A condition, as a request."""

    def __init__(self, holds: Callable[[], bool]) -> None:
        self._holds = holds

    def Test(self) -> bool:  # noqa: N802
        return self._holds()


def _nothing(_: float) -> None:
    pass

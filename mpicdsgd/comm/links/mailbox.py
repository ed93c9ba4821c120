"""Mail: an agent sends its parameters to another, and nobody waits.

One message is under way from each agent; who has mail reads it between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from mpicdsgd.comm.links.assembly import Assembly
from mpicdsgd.comm.waiting import Once

_HEAD = 16  # float32 elements before the parameters, of which the first two hold the weight
_TAG = 1


class Mail:
    """One message of ``size`` parameters and their weight."""

    def __init__(self, size: int, pinned: bool) -> None:
        self._tensor = torch.zeros(_HEAD + size, pin_memory=pinned)
        self.buffer = self._tensor.numpy()
        self.x = self._tensor[_HEAD:]
        self._weight = self.buffer[:2].view(np.float64)
        self.request: Any = None

    @property
    def weight(self) -> float:
        return float(self._weight[0])

    @weight.setter
    def weight(self, value: float) -> None:
        self._weight[0] = value

    def is_done(self) -> bool:
        """Whether the message is complete; true where there is none."""
        return self.request is None or bool(self.request.Test())


class Mailbox:
    """Sends and receives for ``link``, as a part of it. Making it is local.

    Args:
        size: D.
        received: called with x, shape (D,), on the agents' device, and the weight, of each message.
    """

    def __init__(
        self, link: Assembly, size: int, received: Callable[[torch.Tensor, float], None]
    ) -> None:
        self._link, self._device, self._received_mail = link, link.agents.device, received
        pinned = link.agents.device.type == "cuda"
        self._outgoing, self._incoming = Mail(size, pinned), Mail(size, pinned)
        self._sent = np.zeros(link.agents.size, np.int64)  # messages to each agent, since opening
        self._received = 0
        link.parts.append(self)

    def wait_for_room(self) -> None:
        """Wait until the last message has gone; meanwhile others' are read."""
        near = list(self._link.agents.destinations)
        self._link.waiter.wait(Once(self._outgoing.is_done), f"agents {near} to receive")

    def send(self, to: int, x_D: torch.Tensor, weight: float) -> None:
        """Begin to send; there is room."""
        mail = self._outgoing
        mail.weight = weight
        mail.x.copy_(x_D)
        mail.request = self._link.comm.Isend(mail.buffer, to, _TAG)
        self._sent[to] += 1
        self._link.bytes_sent += mail.buffer.nbytes

    def read(self) -> None:
        """Give on all mail that has come."""
        mail = self._incoming
        while True:
            if mail.request is None:
                status = MPI.Status()
                message = self._link.comm.Improbe(MPI.ANY_SOURCE, _TAG, status)
                if message is None:
                    return
                mail.request = message.Irecv(mail.buffer)
            if not mail.is_done():
                return
            mail.request = None
            self._received += 1
            self._received_mail(mail.x.to(self._device), mail.weight)

    def progress(self) -> bool:
        return all([self._outgoing.is_done(), self._incoming.is_done()])

    def rest(self) -> None:
        for looks in self._ending():
            self._link.waiter.wait(looks, "mail under way")

    def end(self) -> Iterator[None]:
        for looks in self._ending():
            for _ in self._link.waiter.looks(looks, "mail under way"):
                yield

    def _ending(self) -> Iterator[Any]:
        """Requests to be waited for in turn, until all mail has been read."""
        sent_to_me = np.empty_like(self._sent)
        yield self._link.comm.Ialltoall(self._sent, sent_to_me)
        yield Once(lambda: self._received == sent_to_me.sum() and self._outgoing.is_done())
        yield self._link.comm.Ibarrier()  # nobody goes on sending before all have read

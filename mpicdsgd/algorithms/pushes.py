"""GoSGD's link: agents push their parameters to random neighbours, each at its own pace.

    with probability p after a step:   w_j <- w_j / 2,  send (w_j, x_j) to a random neighbour
    who finds (w, x) in its mail:      x_j <- x_j + w / (w_j + w) (x - x_j),  w_j <- w_j + w

(Blot et al. 2016.) The weights begin as 1/N; they and those in the mail always add up to 1, and
sum_j w_j x_j with what is in the mail is what the local steps alone have made of it. A neighbour is
one that reads this agent: on a directed graph the push goes along the edge.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.links.link import Link
from mpicdsgd.comm.waiting import Once

EVERY = 32  # steps between signals: at their own pace, the agents are at most twice that apart
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


class Pushes(Link):
    """See the module. Collective over ``agents``.

    Args:
        size: D.
        probability: p.
        seed: of the draws.
    """

    def __init__(
        self, agents: Agents, size: int, timeout_s: float, *, probability: float, seed: int
    ) -> None:
        super().__init__(agents, EVERY, timeout_s)
        self._probability, self._seed = probability, seed
        self._weight = torch.full((1,), 1.0 / agents.size, dtype=torch.float64)
        pinned = agents.device.type == "cuda"
        self._outgoing, self._incoming = Mail(size, pinned), Mail(size, pinned)
        self._sent = np.zeros(agents.size, np.int64)  # messages to each agent, since opening
        self._received = 0

    @property
    def weight(self) -> float:
        """w of this agent."""
        return float(self._weight)

    def stepped(self, step: int) -> None:
        self._read_mail()
        draw = np.random.Generator(np.random.PCG64([self._seed, self.agents.rank, step]))
        near = self.agents.destinations
        if not near or draw.random() >= self._probability:
            return
        to = near[int(draw.integers(len(near)))]
        self.waiter.wait(Once(self._outgoing.is_done), f"agents {list(near)} to receive")
        half = 0.5 * self.weight
        self._weight[0] = half
        mail = self._outgoing
        mail.weight = half
        mail.x.copy_(self.memory.x)
        mail.request = self.comm.Isend(mail.buffer, to, _TAG)
        self._sent[to] += 1
        self.bytes_sent += mail.buffer.nbytes

    def advance(self) -> bool:
        return all([self._outgoing.is_done(), self._incoming.is_done()])

    def began(self, step: int, is_new: bool) -> None:
        if is_new:
            self._weight[0] = 1.0 / self.agents.size

    def look(self) -> None:
        self._read_mail()  # who waits for this one to receive may be the one that it waits for

    def rest(self) -> None:
        for looks in self._ending():
            self.waiter.wait(looks, "mail under way")

    def end(self) -> Iterator[None]:
        for looks in self._ending():
            for _ in self.waiter.looks(looks, "mail under way"):
                yield

    def arrays(self) -> dict[str, torch.Tensor]:
        return {"gossip/weight": self._weight}

    def _ending(self) -> Iterator[Any]:
        """Requests to be waited for in turn, until all mail has been read."""
        sent_to_me = np.empty_like(self._sent)
        yield self.comm.Ialltoall(self._sent, sent_to_me)
        yield Once(lambda: self._received == sent_to_me.sum() and self._outgoing.is_done())
        yield self.comm.Ibarrier()  # nobody goes on sending before all have read

    def _read_mail(self) -> None:
        mail = self._incoming
        while True:
            if mail.request is None:
                status = MPI.Status()
                message = self.comm.Improbe(MPI.ANY_SOURCE, _TAG, status)
                if message is None:
                    return
                mail.request = message.Irecv(mail.buffer)
            if not mail.is_done():
                return
            mail.request = None
            self._received += 1
            self._weight += mail.weight
            self.memory.mix_in(mail.x.to(self.agents.device), mail.weight / self.weight)

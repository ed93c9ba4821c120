"""Two agents show each other their parameters."""

from __future__ import annotations

import torch

from mpicdsgd.comm.links.assembly import Assembly, pieces
from mpicdsgd.comm.waiting import All


class Swap:
    """Swaps for ``link``. Making it is local.

    Args:
        size: D.
    """

    def __init__(self, link: Assembly, size: int) -> None:
        self._link = link
        self._other = torch.zeros(size, pin_memory=link.agents.device.type == "cuda")

    def swap(self, x_D: torch.Tensor, partner: int) -> torch.Tensor:
        """The partner's parameters, shape (D,), on the agents' device. Waits for it."""
        mine, comm = x_D.cpu().numpy(), self._link.comm
        requests = []
        for sent, received in zip(pieces(mine), pieces(self._other.numpy()), strict=True):
            requests.append(comm.Isend(sent, partner))
            requests.append(comm.Irecv(received, partner))
        self._link.waiter.wait(All(list(requests)), f"agent {partner}")
        self._link.bytes_sent += mine.nbytes
        return self._other.to(self._link.agents.device)

"""Centralised SGD's link: every gradient is the mean of all agents', summed during backward.

Gradients are gathered in one flat buffer, laid out as the arena, and ``.grad`` becomes a view into
it: when `backward` returns it holds the mean, which is what clipping and the step see. A bucket of
parameters, the last ones first, is summed as soon as autograd is through with all of it.

Every backward sends all buckets once, always in the same order, so all agents must call it equally
often. A parameter without a gradient counts as one whose gradient is 0. A second backward before
the step adds to the mean and sends all again, which is right as the mean of equal means is itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.links.allreduce import in_order
from mpicdsgd.comm.links.assembly import Assembly
from mpicdsgd.comm.waiting import All
from mpicdsgd.kernels.arena import Arena

log = logging.getLogger("mpicdsgd")

BUCKET = 1 << 20  # elements


class MeanGradients(Assembly):
    """See the module. Collective over ``agents``.

    Args:
        arena: the parameters.
        is_ordered: see `allreduce.Sum`.
    """

    averages_gradients = True

    def __init__(
        self, agents: Agents, arena: Arena, every: int, timeout_s: float, is_ordered: bool = False
    ) -> None:
        super().__init__(agents, every, timeout_s)
        self.parts.append(_Waves(self))
        self._is_ordered = is_ordered
        self._gathered: list[NDArray[np.float32]] = []  # of the buckets that are out, all agents'
        self._arena = arena
        self._flat = torch.zeros(arena.size, device=agents.device)
        self._host = self._flat
        if agents.gpu is not None:
            self._host = torch.zeros(arena.size, pin_memory=True)
            if agents.rank == 0:
                log.warning("gradients are averaged through the host's memory, after backward()")
        self._views = arena.views_of(self._flat)
        self._index = {id(p): i for i, p in enumerate(arena.parameters)}
        self._trained: list[int] = []  # parameters that require a gradient
        self._waiting: list[
            set[int]
        ] = []  # of each bucket: those that autograd is not through with
        self._requests: list[MPI.Request] = []  # of the buckets of this wave that are out
        self._waves = 0  # since the last step
        self._is_backward = False
        self._renew()

    def ready(self, parameter: torch.Tensor) -> None:
        """Autograd has added this backward's gradient of ``parameter``."""
        if not self._is_backward:
            self._is_backward = True
            self._renew()
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._backward_ended)
        i = self._index[id(parameter)]
        bucket = self._bucket_of[i]
        if i not in self._waiting[bucket]:
            raise RuntimeError(
                "autograd was through with a parameter twice in one backward (reentrant "
                "checkpointing?), whose gradient may be on its way already: use_reentrant=False"
            )
        self._take(i)
        self._waiting[bucket].discard(i)
        while len(self._requests) < len(self._waiting) and not self._waiting[len(self._requests)]:
            self._send()
        self.progress()

    def complete_gradients(self) -> None:
        if self._is_backward:
            raise RuntimeError(
                "the last backward() was interrupted by an exception: the agents are out of step, "
                "end the job and go on from a checkpoint"
            )
        if self._waves == 0:
            self._renew()
            self._end_wave()
        self._waves = 0

    def advance(self) -> bool:
        """Let MPI move data, for a moment; whether nothing is under way. During backward, too."""
        return MPI.Request.Testall(self._requests) if self._requests else True

    def _backward_ended(self) -> None:
        self._end_wave()
        self._is_backward = False

    def _end_wave(self) -> None:
        for bucket in self._waiting[len(self._requests) :]:
            for i in list(bucket):
                self._take(i)
        while len(self._requests) < len(self._waiting):
            self._send()
        self._wait()
        self._waves += 1
        self._requests = []

    def _take(self, i: int) -> None:
        """Have the gradient stand in the flat buffer, and be a view of it."""
        parameter, view = self._arena.parameters[i], self._views[i]
        gradient = parameter.grad
        if gradient is None:
            view.zero_()
        elif gradient.data_ptr() != view.data_ptr():
            view.copy_(gradient.to_dense() if gradient.is_sparse else gradient)
        parameter.grad = view

    def _send(self) -> None:
        begin, end = self._ranges[len(self._requests)]
        part = self._flat[begin:end].mul_(1.0 / self.agents.size)
        if self._host is not self._flat:
            self._host[begin:end].copy_(part)
        sent = self._host[begin:end].numpy()
        if self._is_ordered:
            self._gathered.append(np.empty((self.agents.size, sent.size), np.float32))
            self._requests.append(self.comm.Iallgather(sent, self._gathered[-1]))
            self.bytes_sent += sent.nbytes * (self.agents.size - 1)
            return
        self._requests.append(self.comm.Iallreduce(MPI.IN_PLACE, sent, MPI.SUM))
        self.counted(sent.nbytes)

    def _wait(self) -> None:
        self.waiter.wait(All(list(self._requests)), "the other agents' gradients")
        for (begin, end), rows in zip(self._ranges, self._gathered, strict=False):
            in_order(rows, self._host[begin:end].numpy())
        self._gathered = []
        if self._host is not self._flat:
            for begin, end in self._ranges[: len(self._requests)]:
                self._flat[begin:end].copy_(self._host[begin:end])

    def _renew(self) -> None:
        """Begin a wave; buckets are made anew where parameters were frozen or set free."""
        trained = [i for i, p in enumerate(self._arena.parameters) if p.requires_grad and p.numel()]
        if trained != self._trained or not self._waiting:
            self._trained = trained
            self._members, self._ranges = buckets(self._arena.segments, trained)
            self._bucket_of = {i: b for b, m in enumerate(self._members) for i in m}
        self._waiting = [set(members) for members in self._members]


def buckets(
    segments: NDArray[np.void], trained: list[int]
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """The parameters of each bucket, the last ones first, and where in the arena it lies.

    Args:
        segments: of the arena.
        trained: the parameters that have a gradient, ascending.
    """
    members: list[list[int]] = []
    size = BUCKET
    for i in reversed(trained):
        if size >= BUCKET or members[-1][-1] != i + 1:
            members.append([])
            size = 0
        members[-1].append(i)
        size += int(segments["length"][i])
    ends = segments["offset"] + segments["length"]
    return members, [(int(segments["offset"][m[-1]]), int(ends[m[0]])) for m in members]


class _Waves:
    """The part of the assembly that the buckets under way are."""

    def __init__(self, gradients: MeanGradients) -> None:
        self._gradients = gradients

    def progress(self) -> bool:
        return self._gradients.advance()

    def rest(self) -> None:
        """Nothing: a backward ends with the last bucket."""

    def end(self) -> Iterator[None]:
        yield from ()

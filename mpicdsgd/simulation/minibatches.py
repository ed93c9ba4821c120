"""Minibatches of many agents in one process: those that each would take in a job."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpicdsgd.data.loading import Everyone
from mpicdsgd.data.samples import ArraySamples, Indices, Samples
from mpicdsgd.data.shuffle import Shuffler


class Group(NamedTuple):
    """Batches of the same shape, one for each of some agents.

    Attributes:
        agents: int64, shape (n,), ascending.
        inputs, targets: shape (n, B, ...).
    """

    agents: NDArray[np.int64]
    inputs: Tensor
    targets: Tensor


class Together:
    """The training samples of all agents, and the order in which each goes through its own.

    Args:
        everyone: from `load_everyone`.
        batch_size, seed, drop_last: as of `Shuffler`.

    Attributes:
        steps_per_epoch: the same for all agents, as are the sizes of their batches.
        shares: samples of each agent.

    Raises:
        UserError: see `Shuffler`.
    """

    def __init__(self, everyone: Everyone, batch_size: int, seed: int, drop_last: bool) -> None:
        self._indices, self._share = everyone.indices, everyone.share
        self.shares = tuple(map(len, everyone.indices))
        # Held as arrays, samples are taken for many agents at once; else each agent has its own,
        # since random augmentation may depend on which items make a batch.
        self._whole = everyone.train if isinstance(everyone.train, ArraySamples) else None
        agents = range(len(self.shares))
        self._own = [] if self._whole else [everyone.share(j) for j in agents]
        first = Shuffler(self.shares, 0, batch_size, seed, drop_last)
        self._shufflers = [copy.copy(first) for _ in agents]  # checking N shares N times is slow
        for j, shuffler in enumerate(self._shufflers):
            shuffler.rank = j
        self.steps_per_epoch = self._shufflers[0].steps_per_epoch
        self._epoch = -1
        self._order: list[NDArray[np.int64]] = []

    def minibatches(self, epoch: int, position: int, agents: range) -> list[Group]:
        """The minibatches of ``agents`` at step ``position`` of ``epoch``."""
        if epoch != self._epoch:
            orders = [np.concatenate(list(s.batches(epoch))) for s in self._shufflers]
            sizes = [len(batch) for batch in self._shufflers[0].batches(epoch)]
            self._order = np.split(np.stack(orders), np.cumsum(sizes)[:-1], axis=1)
            self._epoch = epoch
        return self.take(agents, self._order[position][agents.start : agents.stop], epoch)

    def share(self, agent: int) -> Samples:
        """An agent's own samples."""
        return self._share(agent)

    def take(
        self, agents: Sequence[int], indices: Sequence[Indices] | NDArray[np.int64], epoch: int
    ) -> list[Group]:
        """The samples ``indices`` of each of ``agents``' own, shape (n, B), of an epoch."""
        if self._whole is not None:
            rows = [self._indices[j][i] for j, i in zip(agents, indices, strict=True)]
            inputs, targets = self._whole.batch(np.concatenate(rows))
            shape = len(rows), len(rows[0])
            return [
                Group(
                    np.array(agents),
                    inputs.reshape(*shape, *inputs.shape[1:]),
                    targets.reshape(*shape, *targets.shape[1:]),
                )
            ]
        alike = defaultdict(list)
        for j, i in zip(agents, indices, strict=True):
            (batch,) = self._own[j].batches([i], epoch)
            alike[tuple((part.shape, part.dtype) for part in batch)].append((j, *batch))
        return [
            Group(
                np.array([j for j, _, _ in rows]),
                torch.stack([inputs for _, inputs, _ in rows]),
                torch.stack([targets for _, _, targets in rows]),
            )
            for rows in alike.values()
        ]

"""Which samples an agent takes at which step."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.common.errors import UserError


class Shuffler:
    """The order in which one agent goes through its share; a function of (seed, rank, epoch).

    It keeps no state: any epoch can be started at any step, so a resumed run goes on as if it had
    never stopped. In each epoch an agent with m samples makes a fresh permutation of them
    (``PCG64([seed, rank, epoch])``) and takes them without replacement.

    All agents take the same number of steps, of the same batch sizes: those of the largest share,
    M samples. An agent with m < M samples goes on from the beginning of the epoch's permutation
    when it is through: position i of its epoch is ``permutation[i % m]`` for i = 0 .. M - 1. So
    the first ``M % m`` samples of the permutation are taken ``M // m + 1`` times in that epoch,
    the others ``M // m`` times (with ``drop_last``, M means the samples in full batches only),
    and, as no batch is larger than m, none twice in one batch.

    Args:
        shares: number of samples of every agent, in agent order.
        rank: this agent.
        batch_size: samples per step; the last step of an epoch takes what is left of M.
        seed: not negative; the same on all agents.
        drop_last: leave out a last step that is smaller than ``batch_size``.

    Raises:
        UserError: an empty share, fewer samples than agents, a batch larger than a share. The same
            on all agents.
    """

    def __init__(
        self,
        shares: Sequence[int],
        rank: int,
        batch_size: int,
        seed: int,
        drop_last: bool = False,
    ) -> None:
        assert 0 <= rank < len(shares)
        if batch_size < 1:
            raise UserError(f"data.batch_size = {batch_size}: it must be at least 1")
        if seed < 0:
            raise UserError(f"run.seed = {seed}: it must not be negative")
        total, smallest = sum(shares), min(shares)
        agent = list(shares).index(smallest)
        if total < len(shares):
            raise UserError(f"{total} training samples are too few for {len(shares)} agents")
        if smallest == 0:
            raise UserError(
                f"agent {agent} has no training samples: use fewer agents or another data.partition"
            )
        if batch_size > smallest:
            raise UserError(
                f"data.batch_size = {batch_size} is larger than the share of agent {agent}, "
                f"{smallest} samples: set data.batch_size to at most {smallest}, "
                "or use fewer agents or another data.partition"
            )
        self.shares = tuple(shares)
        self.rank = rank
        self.batch_size = batch_size
        self.seed = seed
        full_steps, rest = divmod(max(shares), batch_size)
        #: The same on all agents.
        self.steps_per_epoch = full_steps + (rest > 0 and not drop_last)
        #: Samples that every agent takes in an epoch, repeated ones included.
        self.samples_per_epoch = max(shares) - (rest if drop_last else 0)

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """Return the epoch's order of this agent's samples, int64, shape (share,)."""
        bits = np.random.PCG64([self.seed, self.rank, epoch])
        return np.random.Generator(bits).permutation(self.shares[self.rank])

    def batches(self, epoch: int, start: int = 0) -> Iterator[NDArray[np.int64]]:
        """Yield the epoch's batches from step ``start`` on: indices into this agent's share."""
        order = self.permutation(epoch)
        for step in range(start, self.steps_per_epoch):
            begin = step * self.batch_size
            end = min(begin + self.batch_size, self.samples_per_epoch)
            yield order[np.arange(begin, end) % len(order)]

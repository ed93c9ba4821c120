"""What a run starts with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mpicdsgd.checkpoints.snapshot import Snapshot
from mpicdsgd.comm.agents import Agents
from mpicdsgd.data import Shuffler
from mpicdsgd.data.loading import Data
from mpicdsgd.graphs.mixing_matrix import MixingMatrix
from mpicdsgd.models.losses import Loss
from mpicdsgd.runs import owner
from mpicdsgd.runs.config import Config
from mpicdsgd.runs.epochs import Course


class Periods(NamedTuple):
    """Steps between two evaluations, two checkpoints, and two that stay; 0: never."""

    evaluate: int
    save: int
    keep: int


@dataclass(frozen=True)
class Inherited:
    """What a run goes on with when agents of it have died; see `survival`.

    Attributes:
        mixing: of the agents that are left.
        snapshot: this agent's own part, in a checkpoint's place; None: there is none yet.
        saved: the step of the newest checkpoint on the disk.
    """

    mixing: MixingMatrix
    snapshot: Snapshot | None
    saved: int | None


@dataclass
class Start:
    """What a run has before its first step. Made by `prepare`.

    Attributes:
        dir: the run's folder, where this start's generation is claimed.
        course: of this start, with the place in the epochs that the checkpoint was at.
        owner: of the folder, on rank 0.
        loss_fn: (outputs, targets) to the mean over the batch, shape ().
        snapshot: this agent's part of the checkpoint to go on from, if there is one.
        is_newcomer: whether this agent has its part of ``snapshot`` from others.
        shared: what all checkpoints of this start say of it; see `Snapshot.shared`.
    """

    config: Config
    agents: Agents
    data: Data
    shuffler: Shuffler
    model: torch.nn.Module
    loss_fn: Loss
    dir: Path
    course: Course
    periods: Periods
    shared: dict[str, Any]
    owner: owner.Owner | None = None
    snapshot: Snapshot | None = None

    def release(self) -> None:
        """Give the folder up. Local."""
        if self.owner is not None:
            self.owner.release()

    @property
    def is_newcomer(self) -> bool:
        return self.snapshot is not None and self.agents.rank >= self.snapshot.agents

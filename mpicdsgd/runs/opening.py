"""What a run opens once it is prepared, before its first step: optimizer, metrics file, trace."""

from __future__ import annotations

import numpy as np
import torch

from mpicdsgd.algorithms.config import descends
from mpicdsgd.algorithms.contract import Circumstances
from mpicdsgd.algorithms.factory import make_optimizer
from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.algorithms.server.server import Server
from mpicdsgd.runs.metrics_file import Metrics
from mpicdsgd.runs.prepared import Start
from mpicdsgd.runs.trace import Recorder


def open_optimizer(start: Start, server: Server | None) -> AgentOptimizer:
    """The config's optimizer of the model. Collective."""
    config, agents = start.config, start.agents
    circumstances = Circumstances(
        start.course.per_epoch,
        np.array([start.data.shares[agents.rank]]),
        config.run.seed,
        agents.size,
        start.course.shift,
    )
    buffers = [b for b in start.model.buffers() if b.dtype == torch.float32]
    with agents.agreement("optimizer"):
        return make_optimizer(
            config.optim,
            start.model.parameters(),
            agents,
            config.exchange,
            circumstances,
            server,
            buffers if config.model.buffers == "mixed" else (),
        )


def open_metrics(start: Start) -> Metrics:
    """The file of metrics, with the lines up to the checkpoint. Collective."""
    agents, snapshot = start.agents, start.snapshot
    with agents.agreement("metrics file"):
        return Metrics(
            start.dir,
            agents.generation,
            snapshot.step if snapshot else None,
            agents.rank == 0,
            tensorboard=start.config.run.tensorboard,
            resume_generation=snapshot.generation if snapshot else None,
        )


def open_trace(start: Start) -> Recorder:
    """The trace of every step, likewise. Collective."""
    agents, snapshot = start.agents, start.snapshot
    with agents.agreement("trace file"):
        return Recorder(
            agents.comm,
            start.dir,
            agents.generation,
            snapshot.step if snapshot else None,
            snapshot.generation if snapshot else None,
            knows_moved=descends(start.config.optim),
        )

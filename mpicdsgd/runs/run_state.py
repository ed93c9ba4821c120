"""What a run has reached, apart from its files: what goes into a checkpoint, and comes from it."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.algorithms.torch_schedulers import restore_schedule
from mpicdsgd.checkpoints.snapshot import Snapshot
from mpicdsgd.comm.agents import Agents
from mpicdsgd.runs import agent_state, rng
from mpicdsgd.runs.config import as_json, differences
from mpicdsgd.runs.evaluation import RunningMeans

log = logging.getLogger("mpicdsgd")


class Standing:
    """An agent's model, optimizer and schedule, and what it has counted in all starts of the run.

    Attributes:
        means: of loss and accuracy, since this epoch began.
        last: line of metrics, or None.
    """

    def __init__(
        self,
        agents: Agents,
        model: torch.nn.Module,
        optimizer: AgentOptimizer,
        scheduler: LRScheduler,
        shared: dict[str, Any],
    ) -> None:
        self.means = RunningMeans()
        self.last: dict[str, Any] | None = None
        self._agents, self._model = agents, model
        self._optimizer, self._scheduler, self._shared = optimizer, scheduler, shared
        self._began = time.monotonic()
        self._before = {"time_s": 0.0, "wait_s": 0.0, "bytes_sent": 0.0}

    def time_s(self) -> float:
        return self._before["time_s"] + time.monotonic() - self._began

    def wait_s(self) -> float:
        return self._before["wait_s"] + self._optimizer.exchange.wait_s

    def bytes_sent(self) -> float:
        return self._before["bytes_sent"] + self._optimizer.exchange.bytes_sent

    def snapshot(self) -> Snapshot:
        """This agent's state, as views. Local."""
        optimizer, model = self._optimizer, self._model
        meta = {
            "random": rng.capture_random(),
            "means": self.means.numbers(),
            "scheduler": as_json(self._scheduler.state_dict()),
            "groups": [{k: v for k, v in g.items() if k != "params"}
                       for g in optimizer.param_groups],
            "time_s": self.time_s(),
            "wait_s": self.wait_s(),
            "bytes_sent": self.bytes_sent(),
            "last": self.last,
        }  # fmt: skip
        shared = {
            **self._shared,
            "parameters_end": optimizer.arena.parameters_end,
            "layout": agent_state.layout(optimizer, model),
            "passing": agent_state.passing(model),
        }
        return Snapshot(
            step=optimizer.steps,
            arrays=agent_state.capture_arrays(optimizer, model),
            meta=as_json(meta),
            shared=as_json(shared),
            generation=self._agents.generation,
            agents=self._agents.size,
        )

    def restore(self, snapshot: Snapshot, is_newcomer: bool) -> None:
        """Go on from ``snapshot``. Collective.

        Args:
            is_newcomer: whether this agent has its part of it from others.

        Raises:
            UserError: on every rank, where it does not fit model or optimizer.
        """
        optimizer, meta = self._optimizer, snapshot.meta
        with self._agents.agreement("the checkpoint's arrays"):
            agent_state.check(optimizer, self._model, snapshot.arrays)
        arrays = snapshot.arrays
        if snapshot.agents != self._agents.size:
            arrays = optimizer.context.begun_anew(arrays)
        random = None if is_newcomer else meta["random"]
        agent_state.restore(optimizer, self._model, snapshot.step, arrays, random)
        if not is_newcomer:
            self.means = RunningMeans(**meta["means"])
        self.last = meta["last"]
        for key in self._before:
            self._before[key] = float(meta[key])
        # What this start has sent already, the run had sent before: the count goes on exactly.
        self._before["bytes_sent"] -= optimizer.exchange.bytes_sent
        then, now = snapshot.shared["config"]["optim"], self._shared["config"]["optim"]
        is_same = not differences(then, now, "optim.")
        with self._agents.agreement("the checkpoint's schedule"):
            restore_schedule(
                self._scheduler, optimizer, meta["scheduler"], meta["groups"] if is_same else None
            )
        if self._agents.rank == 0 and (
            text := agent_state.other_device(snapshot.arrays, self._agents.device)
        ):
            log.warning("%s", text)

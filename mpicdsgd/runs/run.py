"""A run: config, data, model, optimizer, metrics and checkpoints, and the loop over them."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from mpicdsgd.algorithms.server.server import Server
from mpicdsgd.algorithms.torch_schedulers import make_scheduler
from mpicdsgd.checkpoints.background_writer import Background
from mpicdsgd.checkpoints.snapshot import Keep, Snapshot
from mpicdsgd.comm.agreement import agree
from mpicdsgd.comm.exchange.errors import AgentFault
from mpicdsgd.common.errors import UserError
from mpicdsgd.data.prefetch import to_device
from mpicdsgd.models.evaluate import evaluate
from mpicdsgd.runs.config import Config
from mpicdsgd.runs.evaluation import RunningMeans, accuracy, measure, ratio
from mpicdsgd.runs.minibatch import minibatch_step
from mpicdsgd.runs.opening import open_metrics, open_optimizer, open_trace
from mpicdsgd.runs.prepared import Inherited
from mpicdsgd.runs.progress import Progress
from mpicdsgd.runs.requeue_marker import Marker
from mpicdsgd.runs.run_state import Standing
from mpicdsgd.runs.start import prepare
from mpicdsgd.runs.stop import Stop
from mpicdsgd.runs.summary import evaluation, reached

log = logging.getLogger("mpicdsgd")


class Run:
    """A run of one config by the agents of ``comm``. Making it is collective, and so is `train`.

    Args:
        server: where the algorithm needs one.
        inherited: where agents of the run have died, see `survival`.

    Attributes:
        code: what the program is to end with, once `train` has returned: 0, or see `stop`.

    Raises:
        UserError: on every rank, for anything wrong with config, files or run folder.
    """

    def __init__(
        self,
        config: Config,
        comm: MPI.Intracomm,
        server: Server | None = None,
        inherited: Inherited | None = None,
    ) -> None:
        start = prepare(config, comm, inherited)
        self._of_dead = inherited is not None
        self._is_heir = inherited is not None and inherited.snapshot is not None
        self.config, self.agents = config, start.agents
        self.data, self.shuffler, self.model = start.data, start.shuffler, start.model
        self.loss_fn, self._dir = start.loss_fn, start.dir
        agents, snapshot = start.agents, start.snapshot
        self.course = start.course
        self._deferred = agents.gpu is not None  # the host runs ahead, and waits for no loss
        self._periods = start.periods
        self.code = 0
        self._release = start.release
        saved = snapshot.step if snapshot else None
        if inherited is not None and inherited.snapshot is not None:
            saved = inherited.saved
        self._marker = Marker(
            self._dir, agents.generation, start.owner, saved, config.run.resume != "never"
        )
        self._stop = Stop(agents, config.run, server, start.owner, self._marker)
        self.optimizer = open_optimizer(start, server)
        self.total_steps = self.course.total_steps
        with agents.agreement("schedule"):
            self.scheduler = make_scheduler(
                config.optim, self.optimizer, self.total_steps, self.course.shift
            )
        self._standing = Standing(agents, self.model, self.optimizer, self.scheduler, start.shared)
        self._shown = ""
        if snapshot is not None:
            self._standing.restore(snapshot, start.is_newcomer)
            if agents.rank == 0:
                log.info("going on from step %d in %s", snapshot.step, self._dir)
        self._writer = Background(
            self._dir,
            agents.generation,
            agents.comm,
            Keep(config.run.keep, start.periods.keep, self.course.shift),
            saved,
            agents.local_size,
        )
        self._metrics = open_metrics(start)
        if config.run.theory:
            self.optimizer.measure()
        self._trace = open_trace(start) if config.run.theory else None
        first = agents.rank == 0
        self._progress = Progress(self.total_steps, first, done=self.optimizer.steps)

    def train(self) -> dict[str, Any] | None:
        """Train to the end, or till a stop. Collective. Returns the last line of metrics.

        Raises:
            UserError: on every rank, where an agent's loss or parameters stop being finite.
        """
        try:
            # All wait for it: who fails at once finds it there, and takes it away.
            with self.agents.agreement("the marker"):
                self._marker.begin(self._of_dead)
            with self._progress:
                if self._is_heir:
                    self._make_up()
                while self.optimizer.steps < self.total_steps and not self.optimizer.stopping:
                    self._epoch()
                self._end()
        except (AgentFault, UserError) as error:
            if isinstance(error, UserError) and not error.raised_on_all_ranks:
                self._marker.withdraw()
                raise
            if self.agents.rank == 0:
                self._marker.withdraw()
            self._writer.close()
            self._release()
            raise self._as_mistake(error) from None
        return self._standing.last

    @property
    def saved_step(self) -> int | None:
        """Of the newest checkpoint that this rank knows to be on the disk."""
        return self._writer.step

    def abandon(self) -> Snapshot:
        """Give up this start, as some of its agents are dead; what this agent has. Local.

        Its arrays are views of the old parameters, which nobody changes any more. Here ends what
        this start has of the run's folder.
        """
        self._writer.abandon()
        self._metrics.close()
        self._release()
        while self.scheduler.last_epoch < self.optimizer.steps:
            self.scheduler.step()  # it died between the two: after the post, before the schedule's
        return self._standing.snapshot()

    def _make_up(self) -> None:
        """Do what was due before the step taken over, as a death may have prevented it. Collective.

        A checkpoint is written in any case: one that was under way is lost.
        """
        done, course = self.optimizer.steps, self.course
        at_end = done == self.total_steps
        line = self.agents.comm.bcast(self._metrics.last)
        if line is not None and line["step"] == done:
            self._standing.last = line
        elif at_end or course.was_due(done, self._periods.evaluate, line["epoch"] if line else 0):
            self._evaluate()
        if at_end or self._periods.save:
            self._save()

    def _end(self) -> None:
        done = self.optimizer.steps
        if done < self.total_steps:  # written once, if it is a checkpoint's step anyway
            with self._stop.beside():
                self._save()
        self._writer.close()
        self.optimizer.close()
        self._metrics.close()
        if self._trace is not None:
            self._trace.close()
        if done < self.total_steps:
            self.code = self._stop.leave(done, self._writer.step, self.agents.generation)
        else:
            with self.agents.agreement("the marker"):
                if self.agents.rank == 0:
                    self._marker.remove()
            if self._writer.step != done:  # known to all alike
                self.code = 1
                if self.agents.rank == 0:
                    log.error(
                        "the end is reached, but its checkpoint could not be written: %s in %s",
                        self._kept(),
                        self._dir,
                    )
        self._release()

    def _epoch(self) -> None:
        epoch, position = self.course.place(self.optimizer.steps)
        if position == 0:
            self._standing.means = RunningMeans()
        batches = self.shuffler.batches(epoch, position)
        made = self.data.train.batches(batches, epoch)
        for inputs, targets in to_device(made, self.agents.device):
            self._stop.look(self.optimizer, self._writer.seconds)
            self._step(inputs, targets)
            self._writer.progress()
            self._marker.keep(self._writer.step)
            done = self.optimizer.steps
            at_end = done == self.total_steps
            if at_end or self.course.is_due(done, self._periods.evaluate):
                with self._stop.beside():
                    self._evaluate()
            if at_end or self.course.is_due(done, self._periods.save):
                with self._stop.beside():
                    self._save()
            if self.optimizer.stopping:
                return

    def _step(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        if not self.optimizer.takes_part:
            self.optimizer.mix()
            self.scheduler.step()
            return
        lr = float(self.optimizer.param_groups[0]["lr"])
        loss, right = minibatch_step(
            self.model,
            self.loss_fn,
            self.optimizer,
            inputs,
            targets,
            clip_norm=self.config.optim.clip_norm,
            deferred=self._deferred,
        )
        self.scheduler.step()
        if self._trace is not None:
            self._trace.add(lr, loss, len(targets))
        means = self._standing.means
        means.add(loss, right, len(targets))
        self._progress.update(
            self.optimizer.steps, lambda: f"loss {means.mean_loss():.4f}{self._shown}"
        )

    def _evaluate(self) -> None:
        self._no_fault("evaluation")
        self._flush()
        config, data = self.config.run, self.data
        training = self._standing.means.values()
        if config.evaluate_train:
            with self.optimizer.evaluating():
                loss, right, count = evaluate(
                    self.model, data.train, self.loss_fn, config.evaluate_batch
                )
            training = (ratio(loss, count), accuracy(right, count))
        measured = measure(
            self.agents,
            self.optimizer,
            self.model,
            data.test,
            self.loss_fn,
            config.evaluate_batch,
            training,
        )
        sums = np.array([self._standing.bytes_sent(), self._standing.wait_s()])
        self.agents.comm.Allreduce(MPI.IN_PLACE, sums, MPI.SUM)
        done = self.optimizer.steps
        line = {
            "step": done,
            "epoch": self.course.epoch(done),
            "time_s": self._standing.time_s(),
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            **measured,
            "bytes_sent": int(sums[0]) // self.agents.size,
            "wait_s": sums[1] / self.agents.size,
        }
        self._standing.last = line
        self._metrics.append(line)
        self._shown = f"  {reached(line)}"
        self._progress.line(
            f"{evaluation(line, self.total_steps)}, "
            f"{1e3 * line['wait_s'] / max(done, 1):.1f} ms a step waiting"
        )

    def _save(self) -> None:
        self._no_fault("checkpoint")
        self._flush()
        self._writer.save(self._standing.snapshot())

    def _no_fault(self, where: str) -> None:
        """Raise a fault found by any agent before going into other collectives. Collective."""
        self.optimizer.rest()
        self.optimizer.settle()
        fault = self.optimizer.exchange.fault_known
        error = UserError(str(AgentFault(fault))) if fault.reason else None
        try:
            agree(self.agents.comm, where, error, self.agents.timeout_s)
        except UserError:
            # Also where the fault itself has not arrived yet: closing need not raise it again.
            self.optimizer.exchange.fault_raised = True
            raise

    def _flush(self) -> None:
        """Write the steps since the last flush into the trace, if there is one. Collective."""
        if self._trace is not None:
            self._trace.flush(self.optimizer.measured())

    def _as_mistake(self, error: Exception) -> UserError:
        """What all ranks raise, and what is left of the run."""
        return UserError(f"{error}; {self._kept()} in {self._dir}").everywhere()

    def _kept(self) -> str:
        if self._writer.step is None:
            return "there is no checkpoint yet"
        return f"the checkpoint of step {self._writer.step} is kept"

"""A simulation: the run of a config by N agents in one process, and the loop over it.

What `run.Run` does on N ranks: the same data shares and minibatches, the same parameters at the
start, the same passes of the kernel, the same lines of metrics. Only the gradients are not the same
bits: those of many agents are computed at a time, in another order of sums.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from mpicdsgd.algorithms.config import descends
from mpicdsgd.comm.exchange.errors import AgentFault
from mpicdsgd.comm.exchange.header import Fault, Reason
from mpicdsgd.common.errors import UserError
from mpicdsgd.kernels import native
from mpicdsgd.runs import metrics_file, owner, provenance, toml_config
from mpicdsgd.runs.config import Config, every
from mpicdsgd.runs.progress import Progress
from mpicdsgd.runs.summary import evaluation, reached
from mpicdsgd.runs.trace import SUMS, Lines
from mpicdsgd.simulation.evaluation import measure
from mpicdsgd.simulation.gradients import Part
from mpicdsgd.simulation.start import prepare
from mpicdsgd.simulation.vmapped import add, no_sums


class Simulation:
    """A run of ``config`` by ``agents`` agents in this process. Local, as is `run`.

    Args:
        one_by_one: compute gradients agent by agent, whatever the model.

    Attributes:
        total_steps: of the run.
        layout: where the model's tensors lie in a row of `x`.
        seconds: spent so far on gradients, updates and evaluations.

    Raises:
        UserError: for anything wrong with config, files or run folder, and what is not simulated.
    """

    def __init__(self, config: Config, agents: int, *, one_by_one: bool = False) -> None:
        if agents < 1:
            raise UserError(f"a simulation needs at least one agent, got {agents}")
        self.config, self._agents = config, agents
        start = prepare(config, agents, one_by_one)
        self._start, self.stack, self.layout = start, start.stack, start.layout
        per_epoch = start.together.steps_per_epoch
        self.total_steps = config.run.epochs * per_epoch
        self._scheduler = start.scheduler(config.optim, self.total_steps)
        self._evaluate_every = every("evaluate_every", config.run.evaluate_every, per_epoch)
        # Nothing is saved there, but the trace has its lines' ends there, as a run's has.
        self._flush_every = every("checkpoint_every", config.run.checkpoint_every, per_epoch)
        generation = self._open_folder()
        self._metrics = metrics_file.Metrics(
            self._dir, generation, tensorboard=config.run.tensorboard
        )
        self._trace = Lines(self._dir, generation) if config.run.theory else None
        self._traced: list[tuple[float, NDArray[np.float64]]] = []
        self._means = no_sums(agents)
        self._losses = np.zeros(agents)
        self._batch = 0
        self._spent_since = 0.0
        self._shown = ""
        self.seconds = {"gradients": 0.0, "updates": 0.0, "evaluation": 0.0}
        self._progress = Progress(self.total_steps)
        self._began = time.monotonic()

    @property
    def steps(self) -> int:
        """Steps completed."""
        return self.stack.steps

    @property
    def x(self) -> NDArray[np.float32]:
        """The agents' parameters (and mixed buffers), shape (N, D): a view, not to be written."""
        return self.stack.x.numpy()

    def run(self, watch: Callable[[], None] | None = None) -> dict[str, Any]:
        """Go to the end. Returns the last line of metrics.

        Args:
            watch: called after every step, to look at `x`.

        Raises:
            UserError: an agent's loss or parameters stop being finite. What was written is kept, as
                it is where somebody interrupts.
        """
        line: dict[str, Any] = {}
        try:
            with self._progress:
                self.stack.begin()
                while self.steps < self.total_steps:
                    self._step()
                    if watch is not None:
                        watch()
                    at_end = self.steps == self.total_steps
                    if at_end or (self._evaluate_every and self.steps % self._evaluate_every == 0):
                        line = self._evaluate()
                    if self._flush_every and self.steps % self._flush_every == 0:
                        self._flush()
        finally:
            self._flush()
            self._metrics.close()
            if self._trace is not None:
                self._trace.close()
            self._owner.release()
        return line

    def _step(self) -> None:
        start, stack = self._start, self.stack
        epoch, position = divmod(stack.steps, start.together.steps_per_epoch)
        if position == 0:
            self._means = no_sums(self._agents)
        group = start.hyperparameters.group
        lr = float(group["lr"])
        self._spent_since = time.perf_counter()
        algorithm = stack.algorithm
        taking_part = np.array([algorithm.takes_part(stack.steps, j) for j in range(self._agents)])
        parts: Iterable[Part] = start.population.parts(
            lambda agents: start.together.minibatches(epoch, position, agents),
            start.coefficients(group),
            taking_part,
        )
        if stack.mixes_buffers:  # the forward passes write what the first round mixes
            parts = list(parts)
            self._spent("gradients")
        if start.torch_steps is not None:
            parts = start.torch_steps.apply(parts, self._take, group)
        stack.advance(parts, start.coefficients(group), self._take)
        if start.torch_steps is not None:
            stack.gradient[:] = start.torch_steps.gradient
            stack.penalty[:] = start.torch_steps.penalty
        self._spent("updates")
        if not stack.finite.all():
            self._stop(Reason.NON_FINITE, int(np.argmin(stack.finite)), stack.steps)
        if self._trace is not None:
            unknown = np.full(self._agents, np.nan)
            columns = {
                "loss": self._losses,
                "disagreement": stack.disagreement,
                "gradient": stack.gradient,
                "batch": np.full(self._agents, float(self._batch)),
                "penalty": stack.penalty,
                "moved": stack.moved if descends(self.config.optim) else unknown,
            }
            self._traced.append((lr, np.stack([columns[name] for name in SUMS], axis=1)))
        start.hyperparameters.step()
        self._scheduler.step()
        self._progress.update(stack.steps, lambda: f"loss {self._mean_loss():.4f}{self._shown}")

    def _take(self, part: Part) -> None:
        """Look at some agents' losses, before their gradients are used."""
        self._spent("gradients")
        finite = np.isfinite(part.loss)
        if not finite.all():
            agent = int(part.agents[np.argmin(finite)])
            self._stop(Reason.NON_FINITE_LOSS, agent, self.stack.steps)
        self._losses[part.agents] = part.loss
        self._batch = part.batch
        add(self._means, part.agents, part.loss, part.right, part.batch)

    def _evaluate(self) -> dict[str, Any]:
        self._flush()
        self._spent_since = time.perf_counter()
        start, config, done = self._start, self.config.run, self.steps
        training = self._means
        if config.evaluate_train:
            training = start.population.evaluate_shares(start.together, config.evaluate_batch)
        measured = measure(
            start.population, self.stack, start.model, start.layout, start.test, start.loss_fn,
            config.evaluate_batch, training,
        )  # fmt: skip
        line = {
            "step": done,
            "epoch": done / start.together.steps_per_epoch,
            "time_s": time.monotonic() - self._began,
            "lr": float(start.hyperparameters.group["lr"]),
            **measured,
            "bytes_sent": self.stack.bytes_sent // self._agents,
            "wait_s": 0.0,
        }
        self._metrics.append(line)
        self._shown = f"  {reached(line)}"
        self._progress.line(evaluation(line, self.total_steps))
        self._spent("evaluation")
        return line

    def _flush(self) -> None:
        """Write the steps since the last flush into the trace, if there is one."""
        if self._trace is None or not self._traced:
            return
        traced, self._traced = self._traced, []
        first = self.steps - len(traced)
        everyone = np.stack([row for _, row in traced], axis=1)
        self._trace.append(first, [lr for lr, _ in traced], everyone)

    def _stop(self, reason: Reason, agent: int, step: int) -> None:
        fault = AgentFault(Fault(step, step, reason, agent))
        raise UserError(f"{fault}; what was written is kept in {self._dir}")

    def _mean_loss(self) -> float:
        losses, _, count = self._means
        return float((losses / np.maximum(count, 1)).mean())

    def _spent(self, what: str) -> None:
        """What has passed since the last call went into ``what``."""
        now = time.perf_counter()
        self.seconds[what] += now - self._spent_since
        self._spent_since = now

    def _open_folder(self) -> int:
        """Claim a generation and write the config."""
        self._dir = Path(self.config.run.dir)
        self._owner = owner.claim(self._dir)
        generation = self._owner.generation
        why = self._start.why_one_by_one
        header = {
            **provenance.versions(MPI.Get_library_version(), native.backend),
            "hosts": platform.node(),
            "device": "cpu",
            "threads per rank": torch.get_num_threads(),
            "simulated": f"{self._agents} agents in one process"
            + (f", one by one: {why}" if why else ""),
        }
        path = self._dir / f"config.g{generation:04d}.toml"
        try:
            toml_config.write_toml(self.config, path, header)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        return generation

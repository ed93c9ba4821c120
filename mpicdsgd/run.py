"""A run: config, data, model, optimizer, metrics and checkpoints, and the loop over them."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from mpicdsgd import checkpoint, models, native, record, state
from mpicdsgd import config as reading
from mpicdsgd.agents import Agents
from mpicdsgd.agreement import TIMEOUT_S, agree, agreement, collect
from mpicdsgd.algorithms.choose import (
    Circumstances,
    make_optimizer,
    make_scheduler,
    restore_schedule,
)
from mpicdsgd.background import Background
from mpicdsgd.data import Shuffler, load
from mpicdsgd.data.feed import to_device
from mpicdsgd.errors import UserError
from mpicdsgd.evaluate import evaluate
from mpicdsgd.exchange import AgentFault
from mpicdsgd.links.server import Server
from mpicdsgd.measure import RunningMeans, StepTrace, accuracy, measure, ratio
from mpicdsgd.minibatch import minibatch_step
from mpicdsgd.progress import Progress, evaluation, reached
from mpicdsgd.runconfig import Config, as_json, check, differences, every
from mpicdsgd.specs import graph_from_spec, mixing_from_spec
from mpicdsgd.stop import Stop, remove_marker
from mpicdsgd.trace import Recorder

log = logging.getLogger("mpicdsgd")

_FORMAT = 1  # of a checkpoint's contents, raised when a restart needs other ones


class Run:
    """A run of one config by the agents of ``comm``. Making it is collective, and so is `train`.

    Args:
        server: where the algorithm needs one.

    Attributes:
        code: what the program is to end with, once `train` has returned: 0, or see `stop`.

    Raises:
        UserError: on every rank, for anything wrong with config, files or run folder.
    """

    def __init__(self, config: Config, comm: MPI.Intracomm, server: Server | None = None) -> None:
        self.config = config
        # A timeout that is none is refused where the exchange is opened; till then it is not used.
        timeout_s = config.exchange.timeout_s if config.exchange.timeout_s > 0 else TIMEOUT_S
        with agreement(comm, "topology and mixing", timeout_s):
            graph = graph_from_spec(config.agents.topology, comm.size)
            mixing = mixing_from_spec(config.agents.mixing, graph)
            check(config)
        agents = Agents(comm, mixing, device=config.agents.device, timeout_s=timeout_s)
        self.agents = agents
        self._deferred = agents.gpu is not None  # the host runs ahead, and waits for no loss
        # Else cuDNN adds up gradients in any order, and a restart is not bit by bit the same.
        torch.backends.cudnn.deterministic = True
        agents.require_same("the config", repr(config))
        agents.share_cores(config.agents.threads)

        seed = config.run.seed
        with agents.agreement("data"):
            self.data = load(config.data, seed, agents.rank, agents.size)
            self.shuffler = Shuffler(
                self.data.shares, agents.rank, config.data.batch_size, seed, config.data.drop_last
            )
            per_epoch = self.shuffler.steps_per_epoch
            self.total_steps = config.run.epochs * per_epoch
            self._evaluate_every = every("evaluate_every", config.run.evaluate_every, per_epoch)
            self._save_every = every("checkpoint_every", config.run.checkpoint_every, per_epoch)
            self._keep_every = every("keep_every", config.run.keep_every, per_epoch)
        state.seed_generators(seed, 0 if config.agents.init == "broadcast" else agents.rank + 1)
        with agents.agreement("model"):
            self.model = models.build(config.model, self.data.input_shape, self.data.classes)
            self.model.to(agents.device)
            self.loss_fn = models.loss_function(config.model)
            # A model or loss that does not fit the data is found before anything is written.
            few = np.arange(min(2, len(self.data.test)))
            evaluate(self.model, self.data.test, self.loss_fn, len(few), few)
        if config.agents.init == "broadcast":
            agents.broadcast(self.model)
        state.seed_generators(seed, agents.rank + 1)
        snapshot = self._open_folder()
        self.code = 0
        self._stop = Stop(agents, config.run, server)
        buffers = [b for b in self.model.buffers() if b.dtype == torch.float32]
        with agents.agreement("optimizer"):
            self.optimizer = make_optimizer(
                config.optim,
                self.model.parameters(),
                agents,
                config.exchange,
                Circumstances(per_epoch, self.data.shares[agents.rank], seed, server),
                buffers if config.model.buffers == "mixed" else (),
            )
        with agents.agreement("schedule"):
            self.scheduler = make_scheduler(config.optim, self.optimizer, self.total_steps)
        self._start = time.monotonic()
        self._before = {"time_s": 0.0, "wait_s": 0.0, "bytes_sent": 0.0}
        self._means = RunningMeans()
        self._last: dict[str, Any] | None = None
        self._shown = ""
        if snapshot is not None:
            self._restore(snapshot)
        self._writer = Background(
            self._dir,
            agents.generation,
            agents.comm,
            checkpoint.Keep(config.run.keep, self._keep_every),
            snapshot.step if snapshot else None,
        )
        first = agents.rank == 0
        with agents.agreement("metrics file"):
            self._metrics = record.Metrics(
                self._dir,
                agents.generation,
                snapshot.step if snapshot else None,
                first,
                tensorboard=config.run.tensorboard,
                resume_generation=snapshot.generation if snapshot else None,
            )
        self._trace: Recorder | None = None
        if config.run.theory:
            self.optimizer.measure()
            with agents.agreement("trace file"):
                self._trace = Recorder(
                    agents.comm,
                    self._dir,
                    agents.generation,
                    snapshot.step if snapshot else None,
                    snapshot.generation if snapshot else None,
                )
        self._progress = Progress(self.total_steps, first, done=self.optimizer.steps)

    def train(self) -> dict[str, Any] | None:
        """Train to the end, or till a stop. Collective. Returns the last line of metrics.

        Raises:
            UserError: on every rank, where an agent's loss or parameters stop being finite.
        """
        try:
            with self._progress:
                while self.optimizer.steps < self.total_steps and not self.optimizer.stopping:
                    self._epoch()
                self._end()
        except (AgentFault, UserError) as error:
            if isinstance(error, UserError) and not error.raised_on_all_ranks:
                raise
            self._writer.close()
            raise self._as_mistake(error) from None
        return self._last

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
                    remove_marker(self._dir)

    def _epoch(self) -> None:
        epoch, position = divmod(self.optimizer.steps, self.shuffler.steps_per_epoch)
        if position == 0:
            self._means = RunningMeans()
        batches = self.shuffler.batches(epoch, position)
        made = self.data.train.batches(batches, epoch)
        for inputs, targets in to_device(made, self.agents.device):
            self._stop.look(self.optimizer, self._writer.seconds)
            self._step(inputs, targets)
            self._writer.progress()
            done = self.optimizer.steps
            at_end = done == self.total_steps
            if at_end or (self._evaluate_every and done % self._evaluate_every == 0):
                with self._stop.beside():
                    self._evaluate()
            if at_end or (self._save_every and done % self._save_every == 0):
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
        traced = StepTrace(self.optimizer, self.config.optim) if self._trace is not None else None
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
        if self._trace is not None and traced is not None:
            self._trace.add(lr, loss, len(targets), traced.penalty, traced.moved())
        means = self._means
        means.add(loss, right, len(targets))
        self._progress.update(
            self.optimizer.steps, lambda: f"loss {means.mean_loss():.4f}{self._shown}"
        )

    def _evaluate(self) -> None:
        self._no_fault("evaluation")
        self._flush()
        config, data = self.config.run, self.data
        training = self._means.values()
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
        sums = np.array([self._bytes(), self._wait_s()], dtype=np.float64)
        self.agents.comm.Allreduce(MPI.IN_PLACE, sums, MPI.SUM)
        done = self.optimizer.steps
        line = {
            "step": done,
            "epoch": done / self.shuffler.steps_per_epoch,
            "time_s": self._time_s(),
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            **measured,
            "bytes_sent": int(sums[0]) // self.agents.size,
            "wait_s": sums[1] / self.agents.size,
        }
        self._last = line
        self._metrics.append(line)
        self._shown = f"  {reached(line)}"
        self._progress.line(
            f"{evaluation(line, self.total_steps)}, "
            f"{1e3 * line['wait_s'] / max(done, 1):.1f} ms a step waiting"
        )

    def _save(self) -> None:
        self._no_fault("checkpoint")
        self._flush()
        meta = {
            "random": state.capture_random(),
            "means": self._means.numbers(),
            "scheduler": as_json(self.scheduler.state_dict()),
            "groups": [{k: v for k, v in g.items() if k != "params"}
                       for g in self.optimizer.param_groups],
            "time_s": self._time_s(),
            "wait_s": self._wait_s(),
            "bytes_sent": self._bytes(),
            "last": self._last,
        }  # fmt: skip
        shared = {
            **self._shared,
            "parameters_end": self.optimizer.arena.parameters_end,
            "layout": state.layout(self.optimizer, self.model),
            "passing": state.passing(self.model),
        }
        snapshot = checkpoint.Snapshot(
            step=self.optimizer.steps,
            arrays=state.capture_arrays(self.optimizer, self.model),
            meta=as_json(meta),
            shared=shared,
        )
        self._writer.save(snapshot)

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
        kept = (
            "there is no checkpoint yet"
            if self._writer.step is None
            else f"the checkpoint of step {self._writer.step} is kept"
        )
        mistake = UserError(f"{error}; {kept} in {self._dir}")
        mistake.raised_on_all_ranks = True
        return mistake

    def _open_folder(self) -> checkpoint.Snapshot | None:
        """Find the checkpoint to go on from, claim a generation, write the config. Collective."""
        config, agents = self.config, self.agents
        self._dir = Path(config.run.dir)
        versions = record.versions(MPI.Get_library_version(), native.backend)
        self._shared: dict[str, Any] = {
            "format": _FORMAT,
            "config": dataclasses.asdict(config),
            "Pi": agents.mixing.digest,
            "parameters": [[n, list(p.shape)] for n, p in self.model.named_parameters()],
            "steps_per_epoch": self.shuffler.steps_per_epoch,
            "versions": versions,
        }
        snapshot = None
        if config.run.resume == "auto":
            snapshot = checkpoint.read_newest(self._dir, agents.comm, self._expect)
        if snapshot is not None and agents.rank == 0:
            for key in differences(snapshot.shared["config"], self._shared["config"]):
                log.warning("%s is not what it was before this checkpoint", key)
        hosts = collect(agents.comm, "hosts", MPI.Get_processor_name(), agents.timeout_s)
        generation = 0
        with agents.agreement("run folder"):
            if agents.rank == 0:
                generation = checkpoint.claim_generation(self._dir)
                remove_marker(self._dir)
                header = {
                    **versions,
                    "hosts": ", ".join(hosts),
                    "device": agents.gpu.name if agents.gpu else "cpu",
                    "threads per rank": torch.get_num_threads(),
                    "resumed from step": snapshot.step if snapshot else "none",
                }
                path = self._dir / f"config.g{generation:04d}.toml"
                try:
                    reading.write_toml(config, path, header)
                except OSError as error:
                    raise UserError(f"cannot write {path}: {error.strerror}") from None
        agents.generation = agents.comm.bcast(generation, root=0)
        return snapshot

    def _expect(self, shared: dict[str, Any]) -> None:
        """Raise a UserError if a checkpoint's ``shared`` is of another model or data. Local."""
        remedy = 'set run.dir to another folder or run.resume = "never"'
        if shared.get("format") != _FORMAT:
            raise UserError(
                f"the checkpoint in {self._dir} is of format {shared.get('format')}, this version "
                f"reads format {_FORMAT}: {remedy}"
            )
        for key, what in (
            ("parameters", f"model ({self.config.model.name} now)"),
            ("steps_per_epoch", "data set, batch size or number of samples"),
        ):
            if shared.get(key) != self._shared[key]:
                raise UserError(f"the checkpoint in {self._dir} is of another {what}: {remedy}")
        then = shared.get("config")
        optim = then.get("optim") if isinstance(then, dict) else None
        if not isinstance(optim, dict) or any(
            optim.get(k) != getattr(self.config.optim, k)
            for k in ("name", "nesterov", "asynchronous", "adagrad")
        ):
            raise UserError(
                f"the checkpoint in {self._dir} is of another algorithm than optim.name = "
                f'"{self.config.optim.name}": {remedy}'
            )

    def _restore(self, snapshot: checkpoint.Snapshot) -> None:
        """Go on from ``snapshot``. Collective."""
        meta, optimizer = snapshot.meta, self.optimizer
        with self.agents.agreement("the checkpoint's arrays"):
            state.check(optimizer, self.model, snapshot.arrays)
        state.restore(optimizer, self.model, snapshot.step, snapshot.arrays, meta["random"])
        self._means = RunningMeans(**meta["means"])
        self._last = meta["last"]
        for key in self._before:
            self._before[key] = float(meta[key])
        # What this start has sent already, the run had sent before: the count goes on exactly.
        self._before["bytes_sent"] -= optimizer.exchange.bytes_sent
        with self.agents.agreement("the checkpoint's schedule"):
            restore_schedule(
                self.scheduler,
                optimizer,
                meta["scheduler"],
                meta["groups"] if snapshot.shared["config"]["optim"] == self._optim() else None,
            )
        if self.agents.rank == 0:
            if text := state.other_device(snapshot.arrays, self.agents.device):
                log.warning("%s", text)
            log.info("going on from step %d in %s", snapshot.step, self._dir)

    def _optim(self) -> dict[str, Any]:
        return as_json(dataclasses.asdict(self.config.optim))  # type: ignore[no-any-return]

    def _time_s(self) -> float:
        return self._before["time_s"] + time.monotonic() - self._start

    def _wait_s(self) -> float:
        return self._before["wait_s"] + self.optimizer.exchange.wait_s

    def _bytes(self) -> float:
        return self._before["bytes_sent"] + self.optimizer.exchange.bytes_sent

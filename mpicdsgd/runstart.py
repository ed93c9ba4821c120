"""How a run begins: agents, data, model, the checkpoint to go on from, the run's folder.

`run.Run` makes the optimizer from what is prepared here, and has the loop.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mpi4py import MPI

from mpicdsgd import checkpoint, models, native, owner, record, state
from mpicdsgd import config as reading
from mpicdsgd.agents import Agents
from mpicdsgd.agreement import TIMEOUT_S, agreement, collect
from mpicdsgd.algorithms import settings
from mpicdsgd.course import Course
from mpicdsgd.cycle import Mixing
from mpicdsgd.data import Shuffler, load
from mpicdsgd.data.loading import Data
from mpicdsgd.elastic import origins
from mpicdsgd.errors import UserError
from mpicdsgd.evaluate import evaluate
from mpicdsgd.graph import agents_in_words
from mpicdsgd.marker import remove_marker
from mpicdsgd.matrix import MixingMatrix
from mpicdsgd.runconfig import Config, check, differences, every
from mpicdsgd.specs import graph_from_spec, mixing_from_spec

log = logging.getLogger("mpicdsgd")

_FORMAT = 1  # of a checkpoint's contents, raised when a restart needs other ones


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
    snapshot: checkpoint.Snapshot | None
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
        shared: what all checkpoints of this start say of it; see `checkpoint.Snapshot.shared`.
    """

    config: Config
    agents: Agents
    data: Data
    shuffler: Shuffler
    model: torch.nn.Module
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    dir: Path
    course: Course
    periods: Periods
    shared: dict[str, Any]
    owner: owner.Owner | None = None
    snapshot: checkpoint.Snapshot | None = None

    def release(self) -> None:
        """Give the folder up. Local."""
        if self.owner is not None:
            self.owner.release()

    @property
    def is_newcomer(self) -> bool:
        return self.snapshot is not None and self.agents.rank >= self.snapshot.agents


def prepare(config: Config, comm: MPI.Intracomm, inherited: Inherited | None = None) -> Start:
    """Begin, or go on with, the run of ``config`` by the agents of ``comm``. Collective.

    Args:
        inherited: goes before the config's topology and mixing, and before checkpoints.

    Raises:
        UserError: on every rank, for anything wrong with config, files or run folder.
    """
    # A timeout that is none is refused where the exchange is opened; till then it is not used.
    timeout_s = config.exchange.timeout_s if config.exchange.timeout_s > 0 else TIMEOUT_S
    with agreement(comm, "topology and mixing", timeout_s):
        mixing: Mixing
        if inherited is None:
            graph = graph_from_spec(config.agents.topology, comm.size)
            mixing = mixing_from_spec(config.agents.mixing, graph)
        else:
            mixing = inherited.mixing
        check(config)
        if config.agents.on_death == "continue" and len(mixing.turns) > 1:
            raise UserError(
                f'agents.on_death = "continue" is for one mixing matrix, not a cycle of them '
                f'(agents.mixing = "{config.agents.mixing}"): leave it at "end"'
            )
    agents = Agents(comm, mixing, device=config.agents.device, timeout_s=timeout_s)
    if config.agents.on_death == "continue" and agents.gpu is not None:
        mistake = UserError(
            'agents.on_death = "continue" is for agents on the CPU: set agents.device = "cpu", or '
            'leave it at "end"'
        )
        mistake.raised_on_all_ranks = True  # a GPU is on all or none
        raise mistake
    # Else cuDNN adds up gradients in any order, and a restart is not bit by bit the same.
    torch.backends.cudnn.deterministic = True
    agents.require_same("the config", repr(config))
    agents.share_cores(config.agents.threads)

    seed = config.run.seed
    with agents.agreement("data"):
        data = load(config.data, seed, agents.rank, agents.size)
        shuffler = Shuffler(
            data.shares, agents.rank, config.data.batch_size, seed, config.data.drop_last
        )
        texts = {
            "evaluate_every": config.run.evaluate_every,
            "checkpoint_every": config.run.checkpoint_every,
            "keep_every": config.run.keep_every,
        }
        periods = Periods(*(every(*text, shuffler.steps_per_epoch) for text in texts.items()))
        if periods.keep and agents.rank == 0 and (not periods.save or periods.keep % periods.save):
            log.warning(
                'run.keep_every = "%s" keeps only what run.checkpoint_every = "%s" writes: make it '
                "a multiple of that",
                config.run.keep_every,
                config.run.checkpoint_every,
            )
    state.seed_generators(seed, 0 if config.agents.init == "broadcast" else agents.rank + 1)
    with agents.agreement("model"):
        model = models.build(config.model, data.input_shape, data.classes)
        model.to(agents.device)
        loss_fn = models.loss_function(config.model)
        # A model or loss that does not fit the data is found before anything is written.
        few = np.arange(min(2, len(data.test)))
        evaluate(model, data.test, loss_fn, len(few), few)
    if config.agents.init == "broadcast":
        agents.broadcast(model)
    state.seed_generators(seed, agents.rank + 1)
    start = Start(
        config,
        agents,
        data,
        shuffler,
        model,
        loss_fn,
        Path(config.run.dir),
        Course(config.run.epochs, shuffler.steps_per_epoch),
        periods,
        {
            "format": _FORMAT,
            "config": dataclasses.asdict(config),
            "Pi": agents.mixing.digest,
            "parameters": [[n, list(p.shape)] for n, p in model.named_parameters()],
            "steps_per_epoch": shuffler.steps_per_epoch,
            "versions": record.versions(MPI.Get_library_version(), native.backend),
        },
    )
    part = inherited.snapshot if inherited is not None else None
    # Before the checkpoints are listed: an owner that was taken for dead removes none from now on.
    with agreement(agents.comm, "the run's folder", timeout_s + owner.LONGEST_S):
        if agents.rank == 0:
            start.owner = owner.claim(start.dir, part.generation if part is not None else None)
    agents.generation = agents.comm.bcast(start.owner.generation if start.owner else 0)
    try:
        if part is not None:
            _go_on(start, part)
        elif config.run.resume == "auto":
            _find(start)
        start.shared["shift"] = start.course.shift
        _write_config(start, is_heir=inherited is not None)
    except UserError:
        start.release()
        raise
    if start.is_newcomer and start.snapshot is not None:
        # Not what it drew at the beginning, and the same however often this is tried.
        state.seed_generators(seed, agents.rank + 1, start.snapshot.step)
    return start


def _find(start: Start) -> None:
    """Find the checkpoint to go on from, and where in the epochs it is. Collective."""
    agents, config = start.agents, start.config

    def parts(before: int) -> list[tuple[int, float]]:
        row = origins(agents.mixing, before)[agents.rank]
        return [(agent, float(row[agent])) for agent in np.flatnonzero(row).tolist()]

    snapshot = checkpoint.read_newest(
        start.dir,
        agents.comm,
        lambda shared: _expect(start, shared),
        parts if config.resume.elastic else None,
    )
    if snapshot is None:
        return
    with agents.agreement("resume.elastic"):
        if snapshot.agents != agents.size:
            _check_elastic(config, snapshot.agents, agents.size)
    _go_on(start, snapshot)
    if agents.rank != 0:
        return
    for key in differences(snapshot.shared["config"], start.shared["config"]):
        log.warning("%s is not what it was before this checkpoint", key)
    if snapshot.agents != agents.size:
        _tell(start, snapshot.agents)
    elif snapshot.shared["Pi"] != start.shared["Pi"]:  # of a file, which may have changed
        log.warning("the mixing matrix is not what it was before this checkpoint")


def _go_on(start: Start, snapshot: checkpoint.Snapshot) -> None:
    """Take over ``snapshot`` and its place in the epochs. Local."""
    start.snapshot = snapshot
    then = Course(0, int(snapshot.shared["steps_per_epoch"]), int(snapshot.shared.get("shift", 0)))
    start.course = start.course.going_on(then, snapshot.step)


def _expect(start: Start, shared: dict[str, Any]) -> None:
    """Raise a UserError if a checkpoint's ``shared`` is of another model or data. Local."""
    remedy = 'set run.dir to another folder, or run.resume = "never" to begin anew in this one'
    if shared.get("format") != _FORMAT:
        raise UserError(
            f"the checkpoint in {start.dir} is of format {shared.get('format')}, this version "
            f"reads format {_FORMAT}: {remedy}"
        )
    config, then = start.config, shared.get("config")

    def changed(section: str) -> str:
        if not isinstance(then, dict):
            return ""
        found = differences(then.get(section), start.shared["config"][section], f"{section}.")
        return "".join(f", {text}" for text in found)

    if shared.get("parameters") != start.shared["parameters"]:
        what = changed("model") or f", though it is {config.model.name} as before"
        raise UserError(f"the checkpoint in {start.dir} is of another model{what}: {remedy}")
    if (
        not config.resume.elastic
        and shared.get("steps_per_epoch") != start.shared["steps_per_epoch"]
    ):
        steps = f"{shared.get('steps_per_epoch')} steps, not {start.shared['steps_per_epoch']}"
        raise UserError(
            f"the checkpoint in {start.dir} has epochs of {steps}{changed('data')}: set "
            f"resume.elastic = true to go on all the same; else {remedy}"
        )
    optim = then.get("optim") if isinstance(then, dict) else None
    if not isinstance(optim, dict) or any(
        optim.get(k) != getattr(config.optim, k)
        for k in ("name", "nesterov", "asynchronous", "adagrad")
    ):
        raise UserError(
            f"the checkpoint in {start.dir} is of another algorithm than optim.name = "
            f'"{config.optim.name}": {remedy}'
        )


def _check_elastic(config: Config, before: int, now: int) -> None:
    """Raise a UserError for what cannot go on with another number of agents. Local."""
    change = f"the checkpoint in {config.run.dir} is of {before} agents, the job has {now}"
    if settings.keeps_count(config.optim):
        raise UserError(
            f'{change}: optim.name = "{config.optim.name}" counts what its agents have sent each '
            f"other, and can go on with the same number only: start {before}"
        )
    if config.run.theory:
        raise UserError(
            f"{change}: run.theory = true records a run of one matrix: start {before}, or set it "
            "to false"
        )


def _tell(start: Start, before: int) -> None:
    n = start.agents.size
    first, last = min(n, before), max(n, before) - 1
    one = first == last
    who = f"agent {first}" if one else f"agents {first} to {last}"
    others = (
        f"{who} and {'its' if one else 'their'} momentum are left behind"
        if n < before
        else f"{who} begin{'s' * one} with the mix of {'its' if one else 'their'} neighbours' state"
    )
    mixing = start.agents.mixing
    log.info(
        "%s instead of %d on %s, mixing %s (spectral gap %.3g): %s, and the data are shared out "
        "anew",
        agents_in_words(n),
        before,
        mixing.graph.title,
        mixing.name,
        mixing.spectrum.gap,
        others,
    )


def _write_config(start: Start, is_heir: bool) -> None:
    """Write the config as it is, with what a result depends on. Collective.

    ``is_heir``: of a start whose marker stays: more may die before this one leaves its own.
    """
    agents, snapshot = start.agents, start.snapshot
    hosts = collect(agents.comm, "hosts", MPI.Get_processor_name(), agents.timeout_s)
    with agents.agreement("the run's config"):
        if agents.rank == 0:
            if not is_heir:
                remove_marker(start.dir)
            header = {
                **start.shared["versions"],
                "hosts": ", ".join(hosts),
                "device": agents.gpu.name if agents.gpu else "cpu",
                "threads per rank": torch.get_num_threads(),
                "resumed from step": snapshot.step if snapshot else "none",
            }
            path = start.dir / f"config.g{agents.generation:04d}.toml"
            try:
                reading.write_toml(start.config, path, header)
                assert start.owner is not None
                start.owner.restores(path, path.read_bytes())
            except OSError as error:
                raise UserError(f"cannot write {path}: {error.strerror}") from None

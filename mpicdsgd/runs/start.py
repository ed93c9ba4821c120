"""How a run begins: agents, data, model, the checkpoint to go on from, the run's folder.

`runs.run.Run` makes the optimizer from what is prepared here, and has the loop.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from mpicdsgd.checkpoints.snapshot import Snapshot
from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.agreement import agreement, collect
from mpicdsgd.common.errors import UserError
from mpicdsgd.common.patience import TIMEOUT_S
from mpicdsgd.data import Shuffler, load
from mpicdsgd.data.loading import Data
from mpicdsgd.graphs.mixing_cycle import Mixing
from mpicdsgd.graphs.specs import graph_from_spec, mixing_from_spec
from mpicdsgd.kernels import native
from mpicdsgd.models import build, losses
from mpicdsgd.models.evaluate import evaluate
from mpicdsgd.models.losses import Loss
from mpicdsgd.runs import owner, provenance, rng, toml_config
from mpicdsgd.runs.config import Config, check, every
from mpicdsgd.runs.epochs import Course
from mpicdsgd.runs.prepared import Inherited, Periods, Start
from mpicdsgd.runs.requeue_marker import remove_marker
from mpicdsgd.runs.resume import FORMAT, find_checkpoint, go_on

log = logging.getLogger("mpicdsgd")


def prepare(config: Config, comm: MPI.Intracomm, inherited: Inherited | None = None) -> Start:
    """Begin, or go on with, the run of ``config`` by the agents of ``comm``. Collective.

    Args:
        inherited: goes before the config's topology and mixing, and before checkpoints.

    Raises:
        UserError: on every rank, for anything wrong with config, files or run folder.
    """
    agents = _open_agents(config, comm, inherited)
    # Else cuDNN adds up gradients in any order, and a restart is not bit by bit the same.
    torch.backends.cudnn.deterministic = True
    agents.require_same("the config", repr(config))
    agents.share_cores(config.agents.threads)
    data, shuffler, periods = _load_data(config, agents)
    model, loss_fn = _build_model(config, agents, data)
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
            "format": FORMAT,
            "config": dataclasses.asdict(config),
            "Pi": agents.mixing.digest,
            "parameters": [[n, list(p.shape)] for n, p in model.named_parameters()],
            "steps_per_epoch": shuffler.steps_per_epoch,
            "versions": provenance.versions(MPI.Get_library_version(), native.backend),
        },
    )
    part = inherited.snapshot if inherited is not None else None
    # Before the checkpoints are listed: an owner that was taken for dead removes none from now on.
    _claim(start, part.generation if part is not None else None)
    try:
        _resume(start, part)
        _write_config(start, is_heir=inherited is not None)
    except UserError:
        start.release()
        raise
    if start.is_newcomer and start.snapshot is not None:
        # Not what it drew at the beginning, and the same however often this is tried.
        rng.seed_generators(config.run.seed, agents.rank + 1, start.snapshot.step)
    return start


def _open_agents(config: Config, comm: MPI.Intracomm, inherited: Inherited | None) -> Agents:
    """The agents on their graph, once the config has been checked. Collective."""
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
        raise UserError(
            'agents.on_death = "continue" is for agents on the CPU: set agents.device = "cpu", or '
            'leave it at "end"'
        ).everywhere()  # a GPU is on all or none
    return agents


def _load_data(config: Config, agents: Agents) -> tuple[Data, Shuffler, Periods]:
    """This agent's data, the order of its minibatches, and when what is due. Collective."""
    run = config.run
    with agents.agreement("data"):
        data = load(config.data, run.seed, agents.rank, agents.size)
        shuffler = Shuffler(
            data.shares, agents.rank, config.data.batch_size, run.seed, config.data.drop_last
        )
        texts = {
            "evaluate_every": run.evaluate_every,
            "checkpoint_every": run.checkpoint_every,
            "keep_every": run.keep_every,
        }
        periods = Periods(*(every(*text, shuffler.steps_per_epoch) for text in texts.items()))
        if periods.keep and agents.rank == 0 and (not periods.save or periods.keep % periods.save):
            log.warning(
                'run.keep_every = "%s" keeps only what run.checkpoint_every = "%s" writes: make it '
                "a multiple of that",
                run.keep_every,
                run.checkpoint_every,
            )
    return data, shuffler, periods


def _build_model(config: Config, agents: Agents, data: Data) -> tuple[nn.Module, Loss]:
    """The initial model on this agent's device, and its loss. Collective; seeds the generators."""
    seed, alike = config.run.seed, config.agents.init == "broadcast"
    rng.seed_generators(seed, 0 if alike else agents.rank + 1)
    with agents.agreement("model"):
        model = build.build(config.model, data.input_shape, data.classes)
        model.to(agents.device)
        loss_fn = losses.loss_function(config.model)
        # A model or loss that does not fit the data is found before anything is written.
        few = np.arange(min(2, len(data.test)))
        evaluate(model, data.test, loss_fn, len(few), few)
    if alike:
        agents.broadcast(model)
    rng.seed_generators(seed, agents.rank + 1)
    return model, loss_fn


def _claim(start: Start, heir_of: int | None) -> None:
    """Claim the run's folder for this start; ``heir_of``: see `owner.claim`. Collective."""
    agents = start.agents
    with agreement(agents.comm, "the run's folder", agents.timeout_s + owner.LONGEST_S):
        if agents.rank == 0:
            start.owner = owner.claim(start.dir, heir_of)
    agents.generation = agents.comm.bcast(start.owner.generation if start.owner else 0)


def _resume(start: Start, part: Snapshot | None) -> None:
    """Go on from ``part``, else from a checkpoint if there is one and it may be. Collective."""
    if part is not None:
        go_on(start, part)
    elif start.config.run.resume == "auto":
        find_checkpoint(start)
    start.shared["shift"] = start.course.shift


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
                toml_config.write_toml(start.config, path, header)
                assert start.owner is not None
                start.owner.restores(path, path.read_bytes())
            except OSError as error:
                raise UserError(f"cannot write {path}: {error.strerror}") from None

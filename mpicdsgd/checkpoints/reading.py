"""The newest checkpoint that is whole, read by all agents together.

Nothing is read that is not, bit by bit, what was written: sizes and checksums are verified before
HDF5 opens a file, because HDF5 reads a damaged one without a word. Names and checks stand in
``manifest.py``, HDF5 in ``rank_file.py``, a look without MPI in ``inspect.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpicdsgd.checkpoints import rank_file
from mpicdsgd.checkpoints.elastic import Arrays, mixed
from mpicdsgd.checkpoints.manifest import (
    Damaged,
    Manifest,
    Place,
    check_file,
    places,
    read_manifest,
)
from mpicdsgd.checkpoints.snapshot import Snapshot
from mpicdsgd.common.errors import UserError
from mpicdsgd.common.files import reason

if TYPE_CHECKING:
    from mpi4py import MPI

log = logging.getLogger("mpicdsgd")


def read_newest(
    run_dir: Path,
    comm: MPI.Intracomm,
    expect: Callable[[dict[str, Any]], None],
    parts: Callable[[int], Sequence[tuple[int, float]]] | None = None,
) -> Snapshot | None:
    """This agent's part of the newest intact checkpoint. Collective over ``comm``.

    The newest is the one of the highest generation, therein of the highest step. One that is not
    intact is skipped, and rank 0 logs which file of it is damaged and how.

    Args:
        run_dir: the run's folder; every rank must see it.
        expect: called on every rank with `Snapshot.shared`; raises UserError if the checkpoint
            belongs to another run (model, graph, ...).
        parts: of a checkpoint of so many agents, whose states with which weights become this
            rank's (see `elastic`); None: each rank's own, and the number must be the same.

    Returns:
        None if the run has no checkpoint yet.

    Raises:
        UserError: on every rank: the checkpoint is of another number of agents, ``expect`` raised,
            there are checkpoints but none is intact, or the folder cannot be read.
    """
    found: list[Place] = []
    problem = ""
    if comm.rank == 0:
        try:
            found = places(Path(run_dir))
        except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
            problem = (
                f"the checkpoints in {run_dir} cannot be listed ({reason(error)}): "
                "set run.dir to another folder"
            )
    found, problem = comm.bcast((found, problem))
    _agree(comm, problem)
    newest = ""
    for place in found:
        manifest, problem = comm.bcast(_read_manifest(place) if comm.rank == 0 else None)
        if manifest is not None:
            _agree(comm, _mismatch(manifest, place, comm.size, expect, parts is not None))
            mine = [(comm.rank, 1.0)] if parts is None else parts(manifest.agents)
            snapshot, problem = _read_parts(place, manifest, mine, comm.rank == 0)
            problem = next((p for p in comm.allgather(problem) if p), "")
            if snapshot is not None and not problem:
                return snapshot
        newest = newest or f"{place}: {problem}"
        if comm.rank == 0:
            log.warning("checkpoint %s is not intact (%s): taking the one before", place, problem)
    if not found:
        return None
    _agree(
        comm,
        f"none of the {len(found)} checkpoints in {run_dir} is intact ({newest}): "
        "restore one, or remove the folder checkpoints to start anew",
    )
    raise AssertionError("not reached")


def _read_manifest(place: Place) -> tuple[Manifest | None, str]:
    try:
        return read_manifest(place), ""
    except Damaged as damage:
        return None, str(damage)


def _mismatch(
    manifest: Manifest,
    place: Place,
    size: int,
    expect: Callable[[dict[str, Any]], None],
    is_elastic: bool,
) -> str:
    if manifest.agents != size and not is_elastic:
        return (
            f"checkpoint {place.folder} is of {manifest.agents} agents, the job has {size} ranks: "
            f"start {manifest.agents} ranks, set resume.elastic = true to go on with {size}, or "
            "set run.dir to another folder"
        )
    try:
        expect(manifest.shared)
    except UserError as error:
        return str(error)
    return ""


def _read_parts(
    place: Place, manifest: Manifest, parts: Sequence[tuple[int, float]], with_index: bool
) -> tuple[Snapshot | None, str]:
    """The state that ``parts`` of the agents' make, and what is wrong with a file of them.

    Or with the index. Of what is no array, the heaviest part's is taken, the first among equals.
    """
    if with_index and (problem := check_file(place.folder, manifest.files[-1])):
        return None, problem
    meta: dict[str, Any] = {}
    most, bad = 0.0, ""

    def read() -> Iterator[tuple[float, Arrays]]:
        nonlocal meta, most, bad
        for agent, weight in parts:
            found, bad = _read_rank(place, manifest, agent)
            if found is None:
                return
            about, arrays = found
            if weight > most:
                meta, most = about.meta, weight
            yield weight, arrays

    arrays = mixed(read())
    if bad:
        return None, bad
    step, generation = manifest.step, manifest.generation
    return Snapshot(step, arrays, meta, manifest.shared, generation, manifest.agents), ""


def _read_rank(
    place: Place, manifest: Manifest, rank: int
) -> tuple[tuple[rank_file.About, Arrays] | None, str]:
    """An agent's file, if every byte of it is as written; else what is wrong."""
    if problem := check_file(place.folder, manifest.files[rank]):
        return None, problem
    path = place.rank_file(rank)
    try:
        about, arrays = rank_file.read_rank(path)
    except Damaged as damage:
        return None, str(damage)
    if (about.step, about.generation, about.agent, about.agents) != (
        manifest.step, manifest.generation, rank, manifest.agents
    ):  # fmt: skip
        return None, f"{path.name}: is of another checkpoint"
    return (about, arrays), ""


def _agree(comm: MPI.Intracomm, problem: str) -> None:
    """Raise the first rank's problem as a UserError on every rank, if any has one. Collective."""
    first = next((p for p in comm.allgather(problem) if p), "")
    if first:
        raise UserError(first).everywhere()

"""One agent's state at a step, and the files that it becomes. No MPI here.

A process writes only files of its own generation and the manifest comes last, so at every moment,
whoever is killed, the checkpoint before is whole.
"""

from __future__ import annotations

import errno
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from numpy.typing import NDArray

from mpicdsgd.checkpoints import rank_file, retention
from mpicdsgd.checkpoints.manifest import FileEntry, Manifest, Place, write_manifest
from mpicdsgd.checkpoints.rank_file import About, Arrays, Layout
from mpicdsgd.common.files import reason, sync_folder

log = logging.getLogger("mpicdsgd")


@dataclass(frozen=True)
class Snapshot:
    """One agent's state at a step.

    Attributes:
        step: steps done so far.
        arrays: numeric arrays of any shape by name; "/" in a name makes a group in the file, and no
            name may lie below another ("a" and "a/b"). The array "x", shape (D,), is what
            `inspect` takes for the parameters.
        meta: this agent's own, as JSON.
        shared: equal on all agents, as JSON; rank 0's goes into the manifest.
        generation: which generation wrote it; set by `read_newest`.
        agents: how many there were; likewise.
    """

    step: int
    arrays: dict[str, NDArray[Any]]
    meta: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    generation: int = 0
    agents: int = 0


@dataclass(frozen=True)
class Keep:
    """Which checkpoints are kept: the newest ``last``, and those of every ``every`` steps.

    Of step + shift, that is; ``every`` = 0: no others. At least the newest is kept. Whether one
    stays is written into it, so that a later start with other settings keeps what was promised.
    """

    last: int = 3
    every: int = 0
    shift: int = 0  # see `runs.epochs.Course`

    def stays(self, step: int) -> bool:
        """Whether the checkpoint of ``step`` stays when there are newer ones."""
        return self.every > 0 and (step + self.shift) % self.every == 0


class Problem(NamedTuple):
    """Why a checkpoint is not written.

    Attributes:
        text: in words.
        errno: of the system, 0 where it has said nothing.
    """

    text: str
    errno: int = 0

    @classmethod
    def of(cls, error: Exception) -> Problem:
        """What ``error`` says."""
        return cls(reason(error), (error.errno or 0) if isinstance(error, OSError) else 0)


def describe(snapshot: Snapshot, generation: int, rank: int, size: int) -> About:
    """What the rank's file is to say of itself. Local.

    Asserts names and dtypes that can be stored; raises what `json.dumps` does.
    """
    layout = rank_file.layout(snapshot.arrays)
    json.dumps([snapshot.meta, snapshot.shared])  # a mistake of the caller's is raised here
    return About(snapshot.step, generation, rank, size, snapshot.meta, layout)


def alike(layouts: list[Layout]) -> Layout:
    """The arrays that are alike on all agents, of whom the index can be."""
    return {n: s for n, s in layouts[0].items() if all(other.get(n) == s for other in layouts)}


def write_own(
    place: Place, about: About, arrays: Arrays, index: Layout | None = None
) -> tuple[list[FileEntry], Problem | None]:
    """This rank's file, or what is wrong. Local; raises nothing.

    Rank 0 gives what the index is of (see `alike`), and writes that file at the same time.
    """
    try:
        place.folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(1) as pool:  # the disk can do both
            beside = None if index is None else pool.submit(_index, place, about.agents, index)
            entries = [rank_file.write_rank(place, about, arrays)]
            return [*entries, beside.result()] if beside else entries, None
    except Exception as error:  # whatever it is, the other ranks are waiting
        return [], Problem.of(error)


def _index(place: Place, agents: int, arrays: Layout) -> FileEntry:
    for folder in list(place.folder.parents)[:2]:
        sync_folder(folder)
    return rank_file.write_index(place, agents, arrays)


def commit(place: Place, manifest: Manifest) -> Problem | None:
    """Rank 0, once all files are there: the manifest. Local; raises nothing.

    The names of the files that it lists need not be on the disk before its own is: where they are
    not after a crash the checkpoint is found damaged, and the one before it is removed later.

    Returns:
        A problem, None if the checkpoint is there now.
    """
    try:
        write_manifest(place, manifest)
    except Exception as error:
        discard(place, 0)  # the manifest goes before any rank's file does
        return Problem.of(error)
    return None


def prune(place: Place, last: int) -> str:
    """Rank 0, once ``place`` is there: remove older ones but ``last``. Local; raises nothing.

    Returns:
        A remark for the log, or "".
    """
    run_dir = place.folder.parent.parent
    try:
        return retention.prune(run_dir, place.generation, last)
    except OSError as error:
        return f"old checkpoints in {run_dir} cannot be removed: {reason(error)}"


def say(step: int, problems: list[Problem], remark: str, kept: str = "") -> None:
    """Log what became of a checkpoint, if that is worth a word. One rank.

    ``kept``: what there still is where it was not written.
    """
    if problems:
        full = problems[0].errno in (errno.ENOSPC, errno.EDQUOT)
        log.error(
            "the checkpoint of step %d was not written (%s%s): %s%s",
            step,
            problems[0].text,
            f", and {len(problems) - 1} more" if len(problems) > 1 else "",
            kept,
            "; make room, or with a lower run.keep the next start needs less" if full else "",
        )
    if remark:
        log.warning("%s", remark)


def discard(place: Place, rank: int) -> None:
    """Remove what this rank has written of a checkpoint that will not be. Local."""
    mine = [place.rank_file(rank), *([place.manifest, place.index] if rank == 0 else [])]
    for path in sorted(mine, key=lambda p: p != place.manifest):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be removed: %s", path, reason(error))
    retention.remove_if_empty(place.folder)

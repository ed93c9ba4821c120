"""``RUN_DIR/requeue.json``: if this job ends now, it is to go back to the queue. No MPI here.

A job rarely has the time to say so when it ends: a rank is killed for memory, and with a node that
dies the others' MPI fails long before Slurm notices. So a start leaves the marker as it begins to
train; a stop overwrites it with its reason. It goes at the run's end, and where the next start
would meet the same mistake. A fault that comes every time is not to come for ever: ``starts.json``
counts the starts from the same checkpoint, and the fourth leaves one only once there is another.
"""

from __future__ import annotations

import json
import logging
import os
import weakref
from pathlib import Path
from typing import Any

from mpicdsgd.common.errors import UserError
from mpicdsgd.common.files import reason, write_whole
from mpicdsgd.runs.owner import Owner

log = logging.getLogger("mpicdsgd")

MARKER = "requeue.json"
COUNT = "starts.json"
STARTS = 3  # from one checkpoint that send the job back, if it ends without another one
_UNTOLD = "ended before it could say why"


class Marker:
    """The marker of one start. Local, as all here is.

    Args:
        owner: of the run's folder, on the rank that leaves the marker; None on the others.
        step: of the checkpoint that the start goes on from, if there is one.
        resumes: whether another start would go on at all.
    """

    def __init__(
        self, run_dir: Path, generation: int, owner: Owner | None, step: int | None, resumes: bool
    ) -> None:
        self._dir = Path(run_dir).absolute()
        self._path = self._dir / MARKER
        self._generation, self._job = generation, os.environ.get("SLURM_JOB_ID", "")
        self._owner, self._begun_at, self._resumes = owner, step, resumes
        self._known = step  # newest checkpoint when the marker was last looked after
        self._in_vain = self._withdrawn = False
        _mine.add(self)

    def begin(self, is_heir: bool = False) -> None:
        """Leave it as training begins, unless too many starts have come no further.

        ``is_heir``: this is not another start, but what is left of one.
        """
        if self._owner is None or not self._resumes:
            return
        begun_at, starts = self._counted()
        if is_heir:
            self._begun_at = begun_at
        else:
            starts = starts + 1 if begun_at == self._begun_at else 1
            about = {"from_step": self._begun_at, "starts": starts}
            try:
                write_whole(self._dir / COUNT, (json.dumps(about) + "\n").encode())
            except OSError as error:
                log.warning("%s cannot be written: %s", self._dir / COUNT, reason(error))
        self._in_vain = starts > STARTS
        if not self._in_vain:
            self._leave()
        elif not is_heir:
            where = "the beginning" if self._begun_at is None else f"step {self._begun_at}"
            log.warning(
                "%d starts from %s have ended without another checkpoint: until this one has "
                "written one, the job is not sent back to the queue if it fails", STARTS, where,
            )  # fmt: skip

    def keep(self, step: int | None) -> None:
        """Look after it once there is another checkpoint; ``step``: of the newest one."""
        if step == self._known:
            return
        self._known = step
        if self._owner is None or not self._resumes or self._withdrawn:
            return
        if step is not None and step > (self._begun_at or 0):
            self._in_vain = False
        if not self._in_vain and not self._path.exists():
            self._leave()

    def write(self, **about: Any) -> None:
        """Write it, with the generation and the Slurm job it is about.

        Raises:
            OSError: it cannot be written.
        """
        text = json.dumps({"generation": self._generation, "job": self._job, **about})
        write_whole(self._path, f"{text}\n".encode())

    def withdraw(self) -> None:
        """`remove` where something else has gone wrong already. Any rank may."""
        try:
            self.remove()
        except UserError as error:
            log.warning("%s", error)

    def remove(self) -> None:
        """Take it away if it is there and no newer start's.

        Raises:
            UserError: it cannot be removed, and the job would be sent back to the queue.
        """
        self._withdrawn = True
        try:
            found = json.loads(self._path.read_text())
            generation = int(found["generation"])
            # The same one, but another job's: the folder was removed and made anew.
            is_anothers = generation == self._generation and found["job"] != self._job
            if generation > self._generation or is_anothers:
                return
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            pass  # it says nothing that counts
        remove_marker(self._dir)

    def _leave(self) -> None:
        assert self._owner is not None
        if self._owner.is_taken_over:
            return
        try:
            self.write(reason=_UNTOLD)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, reason(error))

    def _counted(self) -> tuple[int | None, int]:
        """The step that starts went on from, and how many did so in a row."""
        try:
            found = json.loads((self._dir / COUNT).read_text())
            step = found["from_step"]
            return None if step is None else int(step), int(found["starts"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None, 0


_mine: weakref.WeakSet[Marker] = weakref.WeakSet()


def withdraw_all() -> None:
    """Take away what this process's runs have left: somebody wants the job to end."""
    for held in list(_mine):
        held.withdraw()


def remove_marker(run_dir: Path) -> None:
    """Have no marker in the run's folder: a run has begun, or ended for good. Local.

    Raises:
        UserError: it cannot be removed, and a job would be sent back to the queue for ever.
    """
    try:
        (run_dir / MARKER).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{run_dir / MARKER} cannot be removed ({reason(error)}): remove it by hand"
        ) from None

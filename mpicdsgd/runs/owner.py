"""One living owner of a run's folder. No MPI here: rank 0 calls it for all.

Who starts or goes on with a run claims the next *generation* of its folder: a file
``generation-NNNN``, created with O_EXCL, so that of two who come at once one gets it. It says which
process holds it, and that process touches it every few seconds while it lives. A newcomer waits for
a living owner's end for a while, and then refuses; a dead one's folder it takes over.

That an owner is dead can be a mistake (a process that was stopped, a file system that hung). It
does no harm: every file carries its writer's generation, and readers take the newest.
"""

from __future__ import annotations

import atexit
import errno
import json
import logging
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from mpicdsgd.checkpoints.manifest import places
from mpicdsgd.common.errors import UserError
from mpicdsgd.common.files import reason, sync_folder, temporary_name, write_whole
from mpicdsgd.common.run_folder import claim_file, newest_generation
from mpicdsgd.runs.process_identity import has_ended, identity, now

log = logging.getLogger("mpicdsgd")

BEAT_S = 5.0  # between two touches
SILENT_S = 20.0  # without one an owner is dead; an NFS client shows them a few seconds late
PATIENCE_S = 60.0  # how long a living owner's end is waited for
LONGEST_S = PATIENCE_S + 2 * SILENT_S  # that `claim` takes, at most
_LONG_AGO_S = 3600.0  # more than clocks in a cluster differ
_LOOK_S = 0.25


class Owner:
    """The claim of a generation, held until `release`. Made by `claim`; local, as all here is.

    Attributes:
        generation: 1 or more.
    """

    def __init__(self, run_dir: Path, generation: int, about: dict[str, Any]) -> None:
        self.generation = generation
        self._run_dir, self._about = run_dir, about
        self._path = claim_file(run_dir, generation)
        self._pid = os.getpid()  # a forked child has not the claim
        self._over = threading.Event()
        self._taken_over = False
        self._files: dict[Path, bytes] = {}
        self._thread = threading.Thread(target=self._beat, name="mpicdsgd owner", daemon=True)
        self._thread.start()
        _mine[self._path.resolve()] = self

    @property
    def is_taken_over(self) -> bool:
        """Whether somebody has claimed a newer generation, so that this one counts no more."""
        return self._taken_over

    def restores(self, path: Path, data: bytes) -> None:
        """Write ``path`` anew if somebody removes the run's folder, and with it the claim."""
        self._files[path.absolute()] = data

    def release(self) -> None:
        """Say that this generation has ended. A second call does nothing."""
        if self._over.is_set() or os.getpid() != self._pid:
            return
        self._over.set()
        self._thread.join()
        try:
            if self._run_dir.exists() and not self._path.exists():  # removed since the last beat
                self._claim_again()
            if self._is_ours():
                write_whole(self._path, _text({**self._about, "until": now()}))
        except FileNotFoundError:  # somebody has removed the run's folder, and nobody needs it
            pass
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, reason(error))

    def _is_ours(self) -> bool:
        """Whether the claim is this process's; another run's, where the folder was made anew."""
        return self._path.read_bytes() == _text(self._about)

    def _beat(self) -> None:
        said = False
        while not self._over.wait(BEAT_S):
            try:
                if not self._path.exists():
                    self._claim_again()
                newer = newest_generation(self._run_dir) > self.generation
                self._taken_over = newer or not self._is_ours()
                if not self._taken_over:
                    os.utime(self._path)
            except OSError as error:
                if not said:
                    log.warning("%s cannot be touched: %s", self._path, reason(error))
                said = True

    def _claim_again(self) -> None:
        """Somebody has removed the run's folder, or the claim."""
        self._run_dir.mkdir(parents=True, exist_ok=True)
        try:
            _write_claim(self._path, self._about)
        except FileExistsError:  # another run was faster
            return
        for path, data in self._files.items():
            if not path.exists():
                write_whole(path, data)
        log.warning("%s was removed while the run goes on: it is made anew", self._path)


@atexit.register
def release_all() -> None:
    """Release what this process still holds. Local."""
    for held in list(_mine.values()):
        held.release()


# Of this process, which may leave a run and begin another one in the same folder.
_mine: weakref.WeakValueDictionary[Path, Owner] = weakref.WeakValueDictionary()


def claim(run_dir: Path, heir_of: int | None = None) -> Owner:
    """Make the run's folder if need be and claim its next generation.

    Takes `LONGEST_S` at most.

    Args:
        heir_of: a generation whose owner is known to be dead.

    Raises:
        UserError: the folder cannot be made or written, or has a living owner.
    """
    run_dir = Path(run_dir).absolute()  # it is touched wherever the process goes
    about = identity()
    try:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        until = time.monotonic() + PATIENCE_S
        while True:
            newest = newest_generation(run_dir)
            if newest != heir_of:
                _wait_for_the_end(run_dir, newest, about, until)
            # Checkpoints that somebody has put there must not be newer than this one's will be.
            next_one = 1 + max([newest, *(place.generation for place in places(run_dir))])
            path = claim_file(run_dir, next_one)
            try:
                _write_claim(path, about)
            except FileExistsError:  # somebody was faster, and is to be judged
                continue
            owner = Owner(run_dir, next_one, about)
            sync_folder(run_dir)
            return owner
    except UserError:
        raise
    except (OSError, ValueError) as error:
        in_the_way = isinstance(error, NotADirectoryError)
        other = "another folder" if in_the_way else "a folder that you may write"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            other = "a folder on a disk with room, or make some"
        raise UserError(
            f"run folder {run_dir} cannot be made or written ({reason(error)}): set run.dir to "
            f"{other}"
        ) from None


def _write_claim(path: Path, about: dict[str, Any]) -> None:
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_text(about))
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # nobody is to wait for an owner that never was
        path.unlink(missing_ok=True)
        raise


def _wait_for_the_end(run_dir: Path, newest: int, me: dict[str, Any], until: float) -> None:
    """Return when generation ``newest`` has no living owner; raise a UserError where it stays."""
    path = claim_file(run_dir, newest)
    if not path.exists():
        return
    beats = _touched(path)
    since = time.monotonic()
    is_long_silent = _now_there(run_dir) - beats > _LONG_AGO_S
    said = False
    while True:
        owner, own = _read(path), _mine.get(path.resolve())
        if own is not None:
            own.release()
            return
        if "until" in owner or has_ended(owner, me):
            return
        now, latest = time.monotonic(), _touched(path)
        if latest != beats:
            beats, since, is_long_silent = latest, now, False
        if is_long_silent or now - since > SILENT_S:
            log.warning("%s has given no sign of life: its run is taken over", _named(owner, path))
            return
        if now > until:
            raise UserError(
                f"run folder {run_dir} is in use by {_named(owner, path)}: wait for its end, end "
                "it, or set run.dir to another folder"
            )
        if not said:
            said = True
            log.info(
                "run folder %s is or was in use by %s: waiting up to %g s to see whether it ends",
                run_dir, _named(owner, path), PATIENCE_S,
            )  # fmt: skip
        time.sleep(_LOOK_S)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # it is being written, or was cut short
        return {}
    return found if isinstance(found, dict) else {}


def _touched(path: Path) -> float:
    """When the file was, by the file system's clock; opened, so that NFS asks its server."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime


def _now_there(run_dir: Path) -> float:
    """The time, by the clock of whoever would touch a file there now."""
    path = temporary_name(run_dir / f"clock-{os.getpid()}-{threading.get_ident()}")
    try:
        path.touch()
        return path.stat().st_mtime
    finally:
        path.unlink(missing_ok=True)


def _text(about: dict[str, Any]) -> bytes:
    return json.dumps(about).encode()


def _named(owner: dict[str, Any], path: Path) -> str:
    if not owner:
        return f"the process that claimed {path.name}"
    job = f", Slurm job {owner['job']}" if owner.get("job") else ""
    return (
        f"process {owner.get('pid')} on {owner.get('host')}{job} (generation "
        f"{int(path.name.rpartition('-')[2])}, since {owner.get('since')})"
    )

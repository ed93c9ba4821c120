"""Which checkpoints stay, and how the others are removed."""

from __future__ import annotations

import contextlib
import os
import re
from itertools import islice
from pathlib import Path

from mpicdsgd.checkpoints.manifest import (
    Damaged,
    Place,
    checkpoints_folder,
    looks_intact,
    places,
    places_in,
    read_manifest,
    step_folders,
)
from mpicdsgd.common.files import sync_folder
from mpicdsgd.common.run_folder import newest_generation

_OWNED = re.compile(r"\.?(?:rank-\d{4,9}|index|manifest)\.g(\d{4,9})\.(?:h5|json)(?:\.tmp)?")


def prune(run_dir: Path, generation: int, keep: int) -> str:
    """Keep the newest ``keep`` checkpoints that look intact and remove what is older. Local.

    Those whose manifest says that they stay do, too. Files of a newer generation are never touched,
    and where one has claimed the run's folder nothing is: it may be reading. What a crash left of
    an unfinished write goes too.

    Returns:
        A remark for the log, or "".

    Raises:
        OSError: something could not be removed.
    """
    assert keep >= 1, "at least one checkpoint is kept"
    if newest_generation(run_dir) > generation:
        taken = f"{run_dir} has been taken over by a newer run"
        return f"{taken}: its checkpoints count, this one's do not"
    ours = (p for p in places(run_dir) if p.generation <= generation and looks_intact(p))
    kept = list(islice(ours, keep))
    for folder in step_folders(run_dir):
        step = int(folder.name.removeprefix("step-"))
        finished = {place.generation for place in places_in(folder)}
        owners = {int(match[1]) for name in os.listdir(folder) if (match := _OWNED.fullmatch(name))}
        for owner in owners:
            place = Place(owner, step, folder)
            unfinished = owner not in finished and any(place < newer for newer in kept)
            old = len(kept) == keep and place < kept[-1]
            stays = owner == max(finished, default=-1) and _stays(place)
            if unfinished or (old and not stays):  # older than a kept one: of no newer generation
                remove(place)
        remove_if_empty(folder)
    sync_folder(checkpoints_folder(run_dir))
    return ""


def _stays(place: Place) -> bool:
    try:
        return read_manifest(place).stays
    except Damaged:
        return False


def remove(place: Place) -> None:
    """Remove a checkpoint's files, the manifest first, so that no half of it is taken for whole."""
    with contextlib.suppress(FileNotFoundError):
        place.manifest.unlink()
        sync_folder(place.folder)
    for name in os.listdir(place.folder):
        match = _OWNED.fullmatch(name)
        if match and int(match[1]) == place.generation:
            with contextlib.suppress(FileNotFoundError):
                (place.folder / name).unlink()


def remove_if_empty(folder: Path) -> None:
    """Remove ``folder`` if nothing is left in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()

"""What checkpoints hold and whether they are intact, without MPI: for login nodes and scripts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mpicdsgd.checkpoints.manifest import (
    Damaged,
    Manifest,
    Place,
    check_file,
    checkpoints_folder,
    places,
    places_in,
    read_manifest,
    step_folders,
    step_of,
)
from mpicdsgd.checkpoints.rank_file import dataset_offset
from mpicdsgd.common.errors import UserError
from mpicdsgd.common.files import reason
from mpicdsgd.common.strict_json import strict

_BLOCK = 1 << 22  # float64 elements of all agents looked at together: 32 MB


def inspect(path: Path) -> dict[str, Any]:
    """All that can be said of checkpoints, as JSON. Local, needs no MPI.

    Args:
        path: a run's folder, a checkpoint's folder, or a manifest.

    Returns:
        ``{"path", "checkpoints": [...]}``, newest first; each with folder, step, generation,
        agents, size_bytes, finished (it has a manifest; else it is being written, or never was to
        the end), intact, problems, files (name, size_bytes, health: "ok" or what is wrong), arrays
        (shape and dtype per agent), consensus (``max_j ||x_j - mean||`` and its root mean square
        for the array "x"; None if it has none or is not intact) and shared. What is unknown
        because the manifest is damaged or missing is None.

    Raises:
        UserError: there is no checkpoint at ``path``.
    """
    path = Path(path)
    try:
        found, unfinished = _find(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    if not found and not unfinished:
        raise UserError(
            f"{path} holds no checkpoint: give a run's folder, one of its checkpoints/step-* "
            "or a manifest"
        )
    reports = [_report(place) for place in found]
    for folder in unfinished:
        blank = _blank(folder, None, "no manifest: not finished", step_of(folder))
        after = (k for k, other in enumerate(reports) if (other["step"] or 0) < blank["step"])
        reports.insert(next(after, len(reports)), blank)
    result: dict[str, Any] = strict({"path": str(path), "checkpoints": reports})
    return result


def find(path: Path) -> list[Place]:
    """The checkpoints at ``path`` (see `inspect`) that have a manifest, newest first. Local.

    Raises UserError if it cannot be read.
    """
    try:
        return _find(path)[0]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None


def _find(path: Path) -> tuple[list[Place], list[Path]]:
    if path.is_file():
        return [place for place in places_in(path.parent) if place.manifest == path], []
    if checkpoints_folder(path).is_dir():
        unfinished = [f for f in step_folders(path) if not places_in(f)]
        return places(path), unfinished[::-1]
    return places_in(path), []


def _report(place: Place) -> dict[str, Any]:
    try:
        manifest = read_manifest(place)
    except Damaged as damage:
        return _blank(place.folder, place.generation, str(damage), step_of(place.folder))
    health = [check_file(place.folder, entry) for entry in manifest.files]
    problems = [problem for problem in health if problem]
    consensus = None
    if not problems:
        try:
            consensus = _consensus(place, manifest)
        except (OSError, ValueError, TypeError, KeyError, MemoryError) as error:
            problems = [f"array x cannot be read: {reason(error)}"]
    return {
        "folder": str(place.folder),
        "step": manifest.step,
        "generation": manifest.generation,
        "agents": manifest.agents,
        "size_bytes": sum(entry.size_bytes for entry in manifest.files),
        "finished": True,
        "intact": not problems,
        "problems": problems,
        "files": [
            {"name": entry.name, "size_bytes": entry.size_bytes, "health": problem or "ok"}
            for entry, problem in zip(manifest.files, health, strict=True)
        ],
        "arrays": manifest.arrays,
        "consensus": consensus,
        "shared": manifest.shared,
    }


def _blank(folder: Path, generation: int | None, problem: str, step: int | None) -> dict[str, Any]:
    unknown = dict.fromkeys(("agents", "size_bytes", "arrays", "consensus", "shared"))
    return {
        **unknown,
        "folder": str(folder),
        "step": step,
        "generation": generation,
        "finished": generation is not None,
        "intact": False,
        "problems": [problem],
        "files": [],
    }


def _consensus(place: Place, manifest: Manifest) -> dict[str, float] | None:
    """max_j ||x_j - mean|| and sqrt(mean_j ||x_j - mean||^2), in float64, block by block."""
    spec = manifest.arrays.get("x")
    if spec is None or np.dtype(spec["dtype"]).kind != "f":
        return None
    n, size, dtype = manifest.agents, math.prod(spec["shape"]), np.dtype(spec["dtype"])
    end = manifest.shared.get("parameters_end")  # mixed buffers lie behind the parameters
    if isinstance(end, int) and 0 <= end <= size:
        size = end
    if size == 0:
        return {"max": 0.0, "rms": 0.0}
    # Mapped, not opened: thousands of agents are more files than a process may hold open.
    maps: list[np.memmap[Any, Any]] = []
    for rank, entry in enumerate(manifest.files[:n]):
        path = place.rank_file(rank)
        offset = dataset_offset(path, "x")
        if offset is None or offset + size * dtype.itemsize > entry.size_bytes:
            return None
        maps.append(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(size,)))
    squares_N = np.zeros(n)
    block = max(1, _BLOCK // n)
    for start in range(0, size, block):
        x_NB = np.stack([x[start : start + block].astype(np.float64) for x in maps])
        x_NB -= x_NB.mean(axis=0)
        squares_N += np.einsum("nb,nb->n", x_NB, x_NB)
    return {"max": float(np.sqrt(squares_N.max())), "rms": float(np.sqrt(squares_N.mean()))}

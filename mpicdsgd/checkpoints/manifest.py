"""Checkpoints on the disk: their names, their manifests, and whether they are intact. No MPI here.

    run.dir/checkpoints/step-00000120/rank-0003.g0002.h5    one per agent
                                      index.g0002.h5        virtual datasets over all agents
                                      manifest.g0002.json   renamed into place last

A checkpoint exists once its manifest does. The manifest holds size and checksum of every other file
(XXH3, 128 bits: `xxh128sum`), and its own: a flipped digit in the step is found too. They are there
against damage, not against a forger, and SHA-256 took longer than the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from mpicdsgd.common.files import is_regular, reason, write_whole

_FORMAT = 2
_LARGEST = 1 << 28  # bytes of a manifest: ten thousand agents need 2 MB
_FOLDER = re.compile(r"step-(\d{8,18})")
_MANIFEST = re.compile(r"manifest\.g(\d{4,9})\.json")


class Damaged(Exception):
    """A checkpoint's file is not what was written; the message names it and says what is wrong."""


@dataclass(frozen=True, order=True)
class Place:
    """Where a checkpoint is; the newest is the greatest."""

    generation: int
    step: int
    folder: Path

    @property
    def manifest(self) -> Path:
        return self.folder / f"manifest.g{self.generation:04d}.json"

    @property
    def index(self) -> Path:
        return self.folder / f"index.g{self.generation:04d}.h5"

    def rank_file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:04d}.g{self.generation:04d}.h5"

    def __str__(self) -> str:
        return f"{self.folder.name} (generation {self.generation})"


@dataclass(frozen=True)
class FileEntry:
    """What the manifest knows of a file."""

    name: str
    size_bytes: int
    xxh128: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is said to hold.

    Attributes:
        files: every agent's file in agent order, then the index.
        arrays: shape and dtype per agent of the arrays that are alike on all agents.
        shared: what the writer put into `Snapshot.shared`.
    """

    step: int
    generation: int
    agents: int
    files: tuple[FileEntry, ...]
    arrays: dict[str, dict[str, Any]]
    shared: dict[str, Any]
    stays: bool


def checkpoints_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def place_of(run_dir: Path, generation: int, step: int) -> Place:
    return Place(generation, step, checkpoints_folder(run_dir) / f"step-{step:08d}")


def step_folders(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders, by step, finished or not.

    Raises:
        OSError: the folder is there and cannot be listed.
    """
    folder = checkpoints_folder(run_dir)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(folder / name for name in names if _FOLDER.fullmatch(name))


def places(run_dir: Path) -> list[Place]:
    """The run's checkpoints that have a manifest, damaged or not, newest first."""
    return sorted((p for f in step_folders(run_dir) for p in places_in(f)), reverse=True)


def places_in(folder: Path) -> list[Place]:
    """The same for one checkpoint folder, which holds one per generation that came by."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    matches = [match for name in names if (match := _MANIFEST.fullmatch(name))]
    step = step_of(folder)
    found = [Place(int(match[1]), -1 if step is None else step, folder) for match in matches]
    return sorted(found, reverse=True)


def step_of(folder: Path) -> int | None:
    """The step that a checkpoint's folder is named after; None if it has another name."""
    match = _FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def write_manifest(place: Place, manifest: Manifest) -> None:
    """Rename the manifest into place: from now on the checkpoint exists.

    Raises:
        OSError: it could not be written.
    """
    body = {
        "format": _FORMAT,
        "step": manifest.step,
        "generation": manifest.generation,
        "agents": manifest.agents,
        "files": [vars(entry) for entry in manifest.files],
        "arrays": manifest.arrays,
        "shared": manifest.shared,
        "stays": manifest.stays,
    }
    text = json.dumps({**body, "sha256": _checksum(body)}, indent=1)
    write_whole(place.manifest, text.encode())


def read_manifest(place: Place) -> Manifest:
    """The manifest, if every byte of it that matters is as written.

    Raises:
        Damaged: it is not.
    """
    name = place.manifest.name
    try:
        if not is_regular(place.manifest) or place.manifest.stat().st_size > _LARGEST:
            raise Damaged(f"{name}: missing, not a plain file, or too large")
        body = json.loads(place.manifest.read_bytes())
        if not isinstance(body, dict) or body.pop("sha256", None) != _checksum(body):
            raise Damaged(f"{name}: its own checksum does not fit")
    except OSError as error:
        raise Damaged(f"{name}: {reason(error)}") from None
    except (ValueError, RecursionError):
        raise Damaged(f"{name}: not JSON (cut short or damaged)") from None
    if body.get("format") != _FORMAT:
        raise Damaged(f"{name}: written by another version (format {body.get('format')!r:.40})")
    manifest = _checked(name, body)
    if manifest.generation != place.generation or place.step not in (-1, manifest.step):
        raise Damaged(f"{name}: is of step {manifest.step}, generation {manifest.generation}")
    return manifest


def _checked(name: str, body: dict[str, Any]) -> Manifest:
    """``body`` as a Manifest. A right checksum alone does not say that a right program wrote it."""
    step: Any = body.get("step")
    generation: Any = body.get("generation")
    agents: Any = body.get("agents")
    for number, least in ((step, 0), (generation, 1), (agents, 1)):
        if type(number) is not int or not least <= number < 10**18:
            raise Damaged(f"{name}: step, generation or agents is no such number")
    files, arrays, shared = (body.get(key) for key in ("files", "arrays", "shared"))
    if not (isinstance(files, list) and isinstance(arrays, dict) and isinstance(shared, dict)):
        raise Damaged(f"{name}: files, arrays or shared is missing")
    if len(files) != agents + 1:
        raise Damaged(f"{name}: lists {len(files)} files for {agents} agents")
    place = Place(generation, step, Path())
    names = [*(place.rank_file(rank).name for rank in range(agents)), place.index.name]
    entries: list[FileEntry] = []
    for expected, item in zip(names, files, strict=True):
        if not isinstance(item, dict) or item.get("name") != expected:
            raise Damaged(f"{name}: does not list {expected} where it belongs")
        size, digest = item.get("size_bytes"), item.get("xxh128")
        if type(size) is not int or size < 0 or not isinstance(digest, str):
            raise Damaged(f"{name}: size or checksum of {expected} is missing")
        entries.append(FileEntry(expected, size, digest))
    for array, spec in arrays.items():
        if not (isinstance(spec, dict) and isinstance(spec.get("dtype"), str)):
            raise Damaged(f"{name}: dtype of array {array!r:.60} is missing")
        shape = spec.get("shape")
        if not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)):
            raise Damaged(f"{name}: shape of array {array!r:.60} is missing")
    if type(stays := body.get("stays")) is not bool:
        raise Damaged(f"{name}: whether it stays is missing")
    return Manifest(step, generation, agents, tuple(entries), arrays, shared, stays)


def _checksum(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def entry_of(path: Path, name: str) -> FileEntry:
    """Size and checksum of the file at ``path``, to be listed as ``name``.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, xxh3_128).hexdigest()
        return FileEntry(name, os.fstat(file.fileno()).st_size, digest)


def check_file(folder: Path, entry: FileEntry, *, contents: bool = True) -> str:
    """What is wrong with a checkpoint's file, in a line that names it; "" if nothing is.

    ``contents=False`` looks at the size alone.
    """
    path = folder / entry.name
    try:
        if not path.exists():
            return f"{entry.name}: missing"
        if not is_regular(path):
            return f"{entry.name}: not a plain file"
        size = path.stat().st_size
        if size != entry.size_bytes:
            return f"{entry.name}: has {size} bytes, {entry.size_bytes} were written"
        if contents and entry_of(path, entry.name) != entry:
            return f"{entry.name}: its checksum is not the one that was written"
    except OSError as error:
        return f"{entry.name}: {reason(error)}"
    return ""


def looks_intact(place: Place) -> bool:
    """Whether manifest and sizes fit. Cheap: reads none of the big files."""
    try:
        manifest = read_manifest(place)
    except Damaged:
        return False
    return not any(check_file(place.folder, entry, contents=False) for entry in manifest.files)

"""The checkpoints of a run that `theory` looks at, each checked."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mpicdsgd.checkpoints import rank_file
from mpicdsgd.checkpoints.manifest import (
    Damaged,
    Manifest,
    Place,
    check_file,
    checkpoints_folder,
    places,
    read_manifest,
)
from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs.mixing_cycle import Mixing
from mpicdsgd.kernels.arena import Arena
from mpicdsgd.runs.config import Config
from mpicdsgd.theory.objective import Floats


@dataclass(frozen=True)
class Saved:
    """All agents' parameters at a checkpoint, float64, shape (N, D)."""

    step: int
    X_ND: Floats


def intact(run_dir: Path) -> list[tuple[Place, Manifest]]:
    """Every intact checkpoint, newest first."""
    if not checkpoints_folder(run_dir).is_dir():
        return []
    found = []
    for where in places(run_dir):
        try:
            manifest = read_manifest(where)
        except Damaged:
            continue
        if not any(check_file(where.folder, entry) for entry in manifest.files):
            found.append((where, manifest))
    return found


def is_of(where: Place, generation: int, config: Config) -> bool:
    """Of this generation, or of one that it goes on from."""
    return where.generation == generation or (
        where.generation < generation and config.run.resume == "auto"
    )


def check_same(
    where: Place, manifest: Manifest, model: nn.Module, mixing: Mixing, n: int, per_epoch: int
) -> None:
    shared = manifest.shared
    parameters = [[name, list(p.shape)] for name, p in model.named_parameters()]
    for key, value, what in (
        ("Pi", mixing.digest, "mixing matrix: set agents.topology or agents.mixing to its files"),
        ("parameters", parameters, "model than the config's: is the code as it was?"),
        ("steps_per_epoch", per_epoch, "data set: set data.path to the run's"),
    ):
        if manifest.agents != n or shared.get(key) != value:
            raise UserError(f"checkpoint {where} is of another {what}")


def saved(where: Place, manifest: Manifest, model: nn.Module) -> Saved | None:
    """All agents' trainable parameters; the files have been checked.

    None where the run, which may go on, has removed the checkpoint meanwhile.
    """
    inner = copy.deepcopy(model)
    arena = Arena(list(inner.parameters()))
    wanted = [p.requires_grad for p in inner.parameters()]
    rows = []
    for rank in range(manifest.agents):
        try:
            _, arrays = rank_file.read_rank(where.rank_file(rank))
        except Damaged as damage:
            if not where.manifest.exists():
                return None
            raise UserError(f"checkpoint {where}: {damage}") from None
        x = arrays.get("x")
        if x is None or x.ndim != 1 or len(x) < arena.size:
            raise UserError(f"checkpoint {where} is of another model than the config's")
        views = arena.views_of(torch.from_numpy(np.ascontiguousarray(x, np.float32)))
        rows.append(
            np.concatenate(
                [
                    v.reshape(-1).double().numpy()
                    for v, own in zip(views, wanted, strict=True)
                    if own
                ]
            )
        )
    return Saved(manifest.step, np.stack(rows))

"""A run's model and loss that can halt their own rank at a chosen moment, to be killed there.

The environment variable VICTIM holds JSON: the rank, and what to halt at: "step" (in that step's
loss function, with an exchange under way), "rename" (before a file of that pattern gets its name,
the ``nth`` time) or "write" (the ``nth`` block of such a file half written). A halted rank makes
the file ``halted`` and sleeps; with "run_on" it goes on instead, so that the kill comes at random.
"""

import fnmatch
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

PLAN: dict[str, Any] = json.loads(os.environ.get("VICTIM", "{}"))
if PLAN.get("rank") != MPI.COMM_WORLD.rank:
    PLAN = {}
_seen = {"step": 0, "rename": 0, "write": 0}


def _halt() -> None:
    Path("halted").touch()
    if not PLAN.get("run_on"):
        time.sleep(600)


def _now(kind: str) -> bool:
    _seen[kind] += 1
    return _seen[kind] == PLAN.get("nth", 1)


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if outputs.requires_grad:
        _seen["step"] += 1
        if _seen["step"] == PLAN.get("step"):
            _halt()
    return nn.functional.cross_entropy(outputs, targets)


def data(path: str, seed: int) -> tuple[Any, Any]:
    """Noisy pictures of four classes."""
    random = np.random.default_rng(0)
    y = random.integers(0, 4, 1800)
    x = random.normal(size=(1800, 1, 8, 8)) + np.eye(4).repeat(16, 1).reshape(4, 1, 8, 8)[y]
    x = x.astype(np.float32)
    return (x[:1440], y[:1440]), (x[1440:], y[1440:])


def model() -> nn.Module:
    """With dropout and BatchNorm: neither a random state nor a buffer may get lost."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 48),
        nn.BatchNorm1d(48),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(48, 4),
    )


_replace, _pwrite = os.replace, os.pwrite


def _halting_replace(source: Any, target: Any) -> None:
    if fnmatch.fnmatch(Path(target).name, PLAN["rename"]) and _now("rename"):
        _halt()
    _replace(source, target)


def _halting_pwrite(handle: int, data: Any, offset: int) -> int:
    name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
    if len(data) > 1000 and fnmatch.fnmatch(name, PLAN["write"]) and _now("write"):
        _pwrite(handle, data[: len(data) // 2], offset)
        _halt()
    return _pwrite(handle, data, offset)


if "rename" in PLAN:
    os.replace = _halting_replace
if "write" in PLAN:
    os.pwrite = _halting_pwrite

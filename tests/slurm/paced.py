"""A run's data, model and loss that last long enough for something to happen to the job.

Each training step of a job's first start sleeps ``PACE_S`` seconds, which changes no bit; what
Slurm starts again runs at full speed.
"""

import os
import time
from typing import Any

import numpy as np
import torch
from torch import nn

PACE_S = float(os.environ.get("PACE_S", "0"))
if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
    PACE_S = 0.0


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


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if outputs.requires_grad:
        time.sleep(PACE_S)
    return nn.functional.cross_entropy(outputs, targets)

"""A run's data, model and loss that last long enough for something to happen to the job.

Each training step of a job's first start sleeps ``PACE_S`` seconds, which changes no bit; what
Slurm starts again runs at full speed.
"""

import os
import time

import torch
from pictures import data, model
from torch import nn

__all__ = ["data", "loss", "model"]

PACE_S = float(os.environ.get("PACE_S", "0"))
if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
    PACE_S = 0.0


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if outputs.requires_grad:
        time.sleep(PACE_S)
    return nn.functional.cross_entropy(outputs, targets)

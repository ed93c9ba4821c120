"""A run's data, model and loss; the loss can halt its rank, as `halting` says."""

import torch
from halting import PLAN, halt, now
from pictures import data, model
from torch import nn

__all__ = ["data", "loss", "model"]


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if outputs.requires_grad and "step" in PLAN and now("step"):
        halt()
    return nn.functional.cross_entropy(outputs, targets)

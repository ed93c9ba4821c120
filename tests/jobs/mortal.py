"""A run's loss and model that kill their rank where a plan says: ``kill -9``, in whatever it does.

The environment variable MORTAL holds JSON, a list of {"rank", "at", "nth", "delay_s", "signal"}:
the rank of the job, "step" (in the loss of a training step), "evaluation" (in one of an evaluation)
or "model" (when a model is made: the second time within the recovery from a death), the how
many-th time, how long after that, 0 if it is left out, and another signal than KILL.
"""

import json
import os
import signal
import threading
from typing import Any

import torch
from torch import nn

_rank = next((os.environ[k] for k in ("PMI_RANK", "OMPI_COMM_WORLD_RANK") if k in os.environ), "0")
_PLANS = [p for p in json.loads(os.environ.get("MORTAL", "[]")) if p["rank"] == int(_rank)]
_seen = {"step": 0, "evaluation": 0, "model": 0}


def _die(name: str = "SIGKILL") -> None:
    os.kill(os.getpid(), signal.Signals[name])


def _come_to(place: str) -> None:
    _seen[place] += 1
    for plan in _PLANS:
        if (plan["at"], plan["nth"]) == (place, _seen[place]):
            if plan.get("delay_s"):
                threading.Timer(plan["delay_s"], _die).start()
            else:
                _die(plan.get("signal", "SIGKILL"))


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    _come_to("step" if outputs.requires_grad else "evaluation")
    return nn.functional.cross_entropy(outputs, targets)


def model(inputs: int = 64, classes: int = 10) -> nn.Module:
    """With dropout and BatchNorm: random states and buffers go on, too."""
    _come_to("model")
    layers: list[Any] = [nn.Flatten(), nn.Linear(inputs, 64), nn.BatchNorm1d(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(64, classes))

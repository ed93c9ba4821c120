"""Everything that a run must keep to go on bit by bit as if it had never stopped."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpicdsgd.algorithms.optimizer import AgentOptimizer
from mpicdsgd.common.errors import UserError

_CUDA = "random/cuda"

# What p publishes is Q(x) after every step, so it is written anew at a restart and not stored.


def capture_arrays(optimizer: AgentOptimizer, model: torch.nn.Module) -> dict[str, NDArray[Any]]:
    """The agent's arrays: x, v (and y), buffers outside the arena, random generators. Local."""
    arrays: dict[str, NDArray[Any]] = dict(optimizer.arrays())
    for name, buffer in local_buffers(optimizer, model).items():
        arrays[f"buffers/{name}"] = buffer.detach().cpu().numpy()
    legacy: Any = np.random.get_state()
    arrays["random/torch"] = torch.get_rng_state().numpy()
    arrays["random/numpy"] = legacy[1]
    device = optimizer.agents.device
    if device.type == "cuda":
        arrays[_CUDA] = torch.cuda.get_rng_state(device).numpy()
    return arrays


def layout(optimizer: AgentOptimizer, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Where in the flat arrays each tensor of the model lies, as JSON. Local.

    Its names (several, where it is tied), shape, strides and offset, in elements.
    """
    names: dict[int, list[str]] = {}
    for kind in (model.named_parameters, model.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    arena = optimizer.arena
    return [
        {
            "names": names[id(tensor)],
            "shape": list(view.shape),
            "strides": list(view.stride()),
            "offset": int(offset),
        }
        for tensor, view, offset in zip(
            arena.tensors, arena.views, arena.segments["offset"], strict=True
        )
    ]


def passing(model: torch.nn.Module) -> list[str]:
    """Buffers that ``state_dict`` leaves out (``persistent=False``), by name. Local."""
    kept = model.state_dict()
    return [name for name, _ in model.named_buffers() if name not in kept]


def check(
    optimizer: AgentOptimizer, model: torch.nn.Module, arrays: dict[str, NDArray[Any]]
) -> None:
    """Raise a UserError unless ``arrays`` has everything that `restore` takes from it. Local."""
    wanted = capture_arrays(optimizer, model)
    if _CUDA not in arrays:
        wanted.pop(_CUDA, None)
    for name, array in wanted.items():
        if name not in arrays or arrays[name].shape != array.shape:
            raise UserError(
                f"the checkpoint has no {name} of shape {array.shape}: it is of another model or "
                'algorithm; set run.dir to another folder or run.resume = "never"'
            )


def restore(
    optimizer: AgentOptimizer,
    model: torch.nn.Module,
    steps: int,
    arrays: dict[str, NDArray[Any]],
    generators: dict[str, Any] | None,
) -> None:
    """Take over what the `capture_` functions gave after ``steps`` steps. Collective (publishes).

    Without ``generators`` this agent's own stay as they are. What was written on a GPU can be taken
    over without one, and the other way: a GPU's generator then stays as it is.
    """
    optimizer.load_arrays(steps, arrays)
    with torch.no_grad():
        for name, buffer in local_buffers(optimizer, model).items():
            buffer.copy_(torch.from_numpy(np.array(arrays[f"buffers/{name}"])))
    if generators is None:
        return
    torch.set_rng_state(torch.from_numpy(np.array(arrays["random/torch"])))
    device = optimizer.agents.device
    if device.type == "cuda" and _CUDA in arrays:
        torch.cuda.set_rng_state(torch.from_numpy(np.array(arrays[_CUDA])), device)
    kind, position, has_gauss, gauss = generators["numpy"]
    np.random.set_state((kind, arrays["random/numpy"], position, has_gauss, gauss))
    version, words, next_gauss = generators["python"]
    random.setstate((version, tuple(words), next_gauss))


def other_device(arrays: dict[str, NDArray[Any]], device: torch.device) -> str:
    """What a user should know where ``arrays`` were not written on a device like ``device``. Local.

    "" where they were.
    """
    then, now = _CUDA in arrays, device.type == "cuda"
    if then == now:
        return ""
    places = ("the CPU", "a GPU")
    return (
        f"the checkpoint was written on {places[then]} and the run continues on {places[now]}: "
        "random numbers drawn there (dropout) are other ones"
        + (", beginning with run.seed's first" if now else "")
    )


def local_buffers(optimizer: AgentOptimizer, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's buffers that are not mixed and so not in the arena, by name. Local."""
    mixed = {id(tensor) for tensor in optimizer.arena.tensors}
    return {name: b for name, b in model.named_buffers() if id(b) not in mixed}

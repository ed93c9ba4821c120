"""A model out of a checkpoint, as safetensors: one agent's, or the average over all. No MPI here.

Neither the model's code nor its data are needed: the manifest says where in the flat array "x" each
of the model's tensors lies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.checkpoints.inspect import find
from mpicdsgd.checkpoints.manifest import Damaged, Manifest, Place, check_file, read_manifest
from mpicdsgd.checkpoints.rank_file import Arrays, read_rank
from mpicdsgd.common.errors import UserError
from mpicdsgd.common.files import reason, temporary_name

_BUFFERS = "buffers/"


def export(path: Path, out: Path, agent: int | None = None) -> dict[str, Any]:
    """Write the model of the newest intact checkpoint at ``path`` to ``out``. Local.

    Values are those that evaluations use (with look-ahead momentum x, not x + mu v), names those of
    the model's ``state_dict``. An average is summed in float64, in agent order; of what is no
    floating-point number (BatchNorm's counter of batches) it has agent 0's. To have it back:
    ``model.load_state_dict(safetensors.torch.load_file(out))``.

    Args:
        path: a run's folder, a checkpoint's folder, or a manifest.
        agent: whose model; None: the average.

    Returns:
        ``step``, ``generation``, ``agents``, ``tensors`` (how many) and ``skipped``, what newer
        checkpoints were passed over and why.

    Raises:
        UserError: there is no intact checkpoint, no such agent, or ``out`` cannot be written.
    """
    path, out = Path(path), Path(out)
    if out.suffix != ".safetensors":
        raise UserError(f"cannot write {out}: give a name that ends in .safetensors")
    place, manifest, skipped = _newest(path)
    if agent is not None and not 0 <= agent < manifest.agents:
        raise UserError(
            f"the checkpoint has agents 0 to {manifest.agents - 1}, there is no agent {agent}"
        )
    layout = _layout(place, manifest)
    arrays = _average(place, manifest.agents) if agent is None else _read(place, agent)
    tensors = _tensors(place, arrays, layout, manifest.shared.get("passing", ()))
    about = {
        "step": str(manifest.step),
        "agents": str(manifest.agents),
        "model": "average" if agent is None else f"agent {agent}",
        "made_by": "mpicdsgd",
    }
    _save(out, tensors, about)
    return {
        "step": manifest.step,
        "generation": manifest.generation,
        "agents": manifest.agents,
        "tensors": len(tensors),
        "skipped": skipped,
    }


def _newest(path: Path) -> tuple[Place, Manifest, list[str]]:
    skipped: list[str] = []
    for place in find(path):
        try:
            manifest = read_manifest(place)
        except Damaged as damage:
            skipped.append(f"{place}: {damage}")
            continue
        checks = (check_file(place.folder, entry) for entry in manifest.files)
        problem = next((text for text in checks if text), "")
        if not problem:
            return place, manifest, skipped
        skipped.append(f"{place}: {problem}")
    if skipped:
        raise UserError(f"no checkpoint in {path} is intact: {'; '.join(skipped)}")
    raise UserError(
        f"{path} holds no checkpoint: give a run's folder, one of its checkpoints/step-* "
        "or a manifest"
    )


def _layout(place: Place, manifest: Manifest) -> list[dict[str, Any]]:
    layout = manifest.shared.get("layout")
    size = manifest.arrays.get("x", {}).get("shape")
    if layout is None or size is None:
        raise UserError(
            f"{place.folder} does not say where its model's tensors lie: an earlier version wrote "
            "it; go on from it for an epoch (run.epochs), and export that"
        )
    try:
        for item in layout:
            names, shape, strides = item["names"], item["shape"], item["strides"]
            if not all(type(name) is str for name in names):
                raise ValueError("a name")
            if len(shape) != len(strides):
                raise ValueError("strides")
            numbers = (item["offset"], *shape, *strides)
            if not all(type(number) is int and number >= 0 for number in numbers):
                raise ValueError("a number")
            last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            if 0 not in shape and item["offset"] + last >= size[0]:
                raise ValueError("an end")
    except (ValueError, TypeError, KeyError, IndexError):
        raise UserError(f"{place.manifest} lists tensors that cannot be") from None
    return list(layout)


def _read(place: Place, agent: int) -> Arrays:
    try:
        return read_rank(place.rank_file(agent))[1]
    except Damaged as damage:
        raise UserError(f"checkpoint {place}: {damage}") from None


def _average(place: Place, agents: int) -> Arrays:
    def wanted(arrays: Arrays) -> Arrays:
        return {n: a for n, a in arrays.items() if n == "x" or n.startswith(_BUFFERS)}

    first = wanted(_read(place, 0))
    floats = [name for name, array in first.items() if array.dtype.kind == "f"]
    sums = {name: first[name].astype(np.float64) for name in floats}
    for agent in range(1, agents):
        arrays = _read(place, agent)
        for name in floats:
            if name not in arrays or arrays[name].shape != first[name].shape:
                raise UserError(f"checkpoint {place}: agent {agent}'s {name} is not as agent 0's")
            sums[name] += arrays[name]
    return first | {name: (sums[name] / agents).astype(first[name].dtype) for name in floats}


def _tensors(
    place: Place, arrays: Arrays, layout: list[dict[str, Any]], passing: Sequence[str]
) -> Arrays:
    """By name, row-major copies."""
    x = np.ascontiguousarray(arrays["x"])
    made: Arrays = {}
    for item in layout:
        strides = [stride * x.itemsize for stride in item["strides"]]
        view: NDArray[Any] = np.ndarray(
            item["shape"], x.dtype, x.data, item["offset"] * x.itemsize, strides
        )
        for name in item["names"]:
            made[name] = np.array(view, order="C")
    for name, array in arrays.items():
        if name.startswith(_BUFFERS):
            made[name.removeprefix(_BUFFERS)] = np.array(array, order="C")
    made = {name: array for name, array in made.items() if name not in passing}
    if not made:
        raise UserError(f"{place.folder} holds no tensor of a model")
    return made


def _save(out: Path, tensors: Arrays, about: dict[str, str]) -> None:
    # Under a name of its own first: who reads ``out`` finds all of it, or what was there before.
    save: Callable[..., None]
    from safetensors.numpy import save_file as save

    temporary = temporary_name(out)
    try:
        save(tensors, str(temporary), metadata=about)
        temporary.replace(out)
    except Exception as error:  # safetensors has an exception of its own
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {out}: {reason(error)}") from None

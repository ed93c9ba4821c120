"""Data sets that are made up from a seed: known problems of any size, for any number of agents.

    gaussians   labels c uniform, inputs u = m_c + delta_jc + noise e: softmax regression
    linear      targets y = (w + delta_j) . u + noise e, inputs u standard normal: least squares
    points      targets b = delta_j + noise e: with model quadratic and loss least_squares, one
                sample each and no noise it is f_j = |x - b_j|^2 / 2

e, m_c and w are standard normal, and delta_j, agent j's own, is heterogeneity times standard normal
(of w: both divided by the root of the features, so that w . u has about the size 1). What agent j
has depends on the seed and j alone, not on the number of agents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.common.errors import UserError
from mpicdsgd.common.plugins import nearest
from mpicdsgd.data.source import Source, from_arrays

# Settings in data.args and their defaults; samples are each agent's.
SYNTHETIC: dict[str, dict[str, int | float]] = {
    "gaussians": {
        "samples": 100, "features": 20, "classes": 10, "noise": 1.0, "heterogeneity": 0.0,
        "test_samples": 1000,
    },
    "linear": {
        "samples": 100, "features": 10, "noise": 0.1, "heterogeneity": 0.0, "test_samples": 1000,
    },
    "points": {"samples": 1, "features": 1, "noise": 0.0, "heterogeneity": 1.0},
}  # fmt: skip

Array = NDArray[np.float64]
_STREAM = 2  # of random numbers, beside partition's 1


def synthetic(
    name: str, agents: int, seed: int, args: Mapping[str, Any], *, in_order: bool, whole: bool
) -> Source:
    """Return the source of the data set ``name``; the same arguments, the same data, everywhere.

    Agent j's samples come one after the other, before agent j + 1's. The test set is of the agents'
    distributions in turn; of ``points`` it is all points, so that the test loss is f itself.

    Args:
        name: one of `SYNTHETIC`.
        agents: how many there are, at least 1.
        seed: the run's.
        args: ``data.args``, see `SYNTHETIC`.
        in_order: whether the samples are divided in their order.
        whole: whether all of them are used.

    Raises:
        UserError: unknown or bad settings; agents that differ where the division would mix them.
    """
    given = _settings(name, args)
    differ = given["heterogeneity"] > 0 and agents > 1
    if differ and not (in_order and whole):
        raise UserError(
            f'data.name = "{name}" with data.args.heterogeneity = {given["heterogeneity"]:g} has '
            'samples of each agent\'s own: set data.partition = "contiguous" and leave data.limit '
            "out, or set data.args.heterogeneity = 0"
        )
    common = _random(seed, 0)
    randoms = [_random(seed, 1 + j) for j in range(agents)]
    make = {"gaussians": _gaussians, "linear": _linear, "points": _points}[name]
    return make(given, common, randoms)


def _gaussians(
    given: dict[str, Any], common: np.random.Generator, randoms: list[np.random.Generator]
) -> Source:
    shape = given["classes"], given["features"]
    centres = common.standard_normal(shape)
    own = [centres + given["heterogeneity"] * random.standard_normal(shape) for random in randoms]

    def draw(j: int, count: int, random: np.random.Generator) -> tuple[Array, Any]:
        labels = random.integers(0, shape[0], count)
        return own[j][labels] + given["noise"] * random.standard_normal((count, shape[1])), labels

    train, test = _both(given, common, randoms, draw)
    return from_arrays(train, test, shape[0])


def _linear(
    given: dict[str, Any], common: np.random.Generator, randoms: list[np.random.Generator]
) -> Source:
    features = given["features"]
    w = common.standard_normal(features)
    own = [w + given["heterogeneity"] * random.standard_normal(features) for random in randoms]

    def draw(j: int, count: int, random: np.random.Generator) -> tuple[Array, Any]:
        u = random.standard_normal((count, features))
        y = u @ own[j] / math.sqrt(features) + given["noise"] * random.standard_normal(count)
        return u, y.astype(np.float32)[:, None]

    train, test = _both(given, common, randoms, draw)
    return from_arrays(train, test, None)


def _points(
    given: dict[str, Any], common: np.random.Generator, randoms: list[np.random.Generator]
) -> Source:
    shape = given["samples"], given["features"]
    points = [
        given["heterogeneity"] * random.standard_normal(shape[1])
        + given["noise"] * random.standard_normal(shape)
        for random in randoms
    ]
    b = np.concatenate(points).astype(np.float32)
    return from_arrays((b, b), (b, b), None)


def _both(
    given: dict[str, Any],
    common: np.random.Generator,
    randoms: list[np.random.Generator],
    draw: Any,
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Training and test set, each as (inputs, targets)."""
    train = [draw(j, given["samples"], random) for j, random in enumerate(randoms)]
    turns = np.bincount(np.arange(given["test_samples"]) % len(randoms), minlength=len(randoms))
    test = [draw(j, count, common) for j, count in enumerate(turns.tolist()) if count]
    return _joined(train), _joined(test)


def _joined(pairs: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    inputs = np.concatenate([inputs for inputs, _ in pairs]).astype(np.float32)
    return inputs, np.concatenate([targets for _, targets in pairs])


def _random(seed: int, number: int) -> np.random.Generator:
    sequence = np.random.SeedSequence(seed, spawn_key=(_STREAM, number))
    return np.random.Generator(np.random.PCG64(sequence))


def _settings(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    defaults = SYNTHETIC[name]
    given: dict[str, Any] = dict(defaults)
    for key, value in args.items():
        if key not in defaults:
            raise UserError(
                f'data.args.{key}: data.name = "{name}" takes {", ".join(defaults)}'
                f"{nearest(key, defaults)}"
            )
        if isinstance(defaults[key], int):
            least = 2 if key == "classes" else 1
            good = type(value) is int and value >= least
            allowed = f"a whole number >= {least}"
        else:
            good = type(value) in (int, float) and math.isfinite(value) and value >= 0
            allowed = "a finite number >= 0"
        if not good:
            raise UserError(f"data.args.{key} = {value!r}: it must be {allowed}")
        given[key] = value
    return given

"""Noise and bias of minibatch gradients, against all samples' gradients in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from mpicdsgd.data.samples import ArraySamples
from mpicdsgd.theory.gradient_noise import gradient_noise, has_batch_statistics, has_dropout
from mpicdsgd.theory.objective import Floats, Objective, in_float64, point

SHARES = (20, 13)


def objectives(p: float = 0.0, shares: tuple[int, ...] = SHARES) -> list[Objective]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(p), nn.Linear(4, 2))
    random = np.random.default_rng(1)
    return [
        Objective(
            in_float64(model),
            functional.cross_entropy,
            ArraySamples(random.standard_normal((n, 3)).astype("f4"), random.integers(0, 2, n)),
            0.2,
        )
        for n in shares
    ]


def at(made: list[Objective], seed: int, scale: float = 1.0) -> Floats:
    size = len(point(made[0].model))
    return scale * np.random.default_rng(seed).standard_normal((len(made), size))


def exact(made: list[Objective], X: Floats, b: int) -> float:
    """sum_j s_j (1/b - 1/n_j), from every sample's gradient."""
    total = 0.0
    for one, x in zip(made, X, strict=True):
        n = len(one.samples)
        rows = np.stack([one.gradient(x, np.array([i]))[1] for i in range(n)])
        total += ((rows - rows.mean(0)) ** 2).sum() / (n - 1) * (1 / b - 1 / n)
    return float(total)


@pytest.mark.parametrize("b", [1, 4, 12])
def test_the_variance_is_that_of_all_samples(b: int) -> None:
    made = objectives()
    points = [at(made, 1), at(made, 2, 3.0)]
    found = gradient_noise(made, points, [None, None], b, 400)
    expected = [exact(made, X, b) for X in points]
    for one, value in zip(found.at, expected, strict=True):
        total = sum(noise.unit * noise.factor(b) for noise in one.noises)
        error = np.sqrt(sum((noise.error * noise.factor(b)) ** 2 for noise in one.noises))
        assert abs(total - value) < 4 * error
        assert error < 0.15 * value
    assert found.Q.value == pytest.approx(max(expected), rel=0.3)
    assert found.Q.value > max(expected) * 0.9
    assert (found.zeta_1.value, found.zeta_1.how) == (found.zeta_2.value, "exact") == (1, "exact")
    # Another size is known from this one: the mean over points, within its spread.
    value, error = found.variance(8)
    assert value == pytest.approx(np.mean([exact(made, X, 8) for X in points]), rel=0.2)
    assert error >= np.std([exact(made, X, 8) for X in points]) * 0.7


def test_sums_at_a_point() -> None:
    made = objectives()
    X = at(made, 1)
    (one,) = gradient_noise(made, [X], [None], 4, 3).at
    gradients = [o.gradient(x) for o, x in zip(made, X, strict=True)]
    assert one.losses == pytest.approx(sum(f for f, _ in gradients))
    assert one.squared == pytest.approx(sum(g @ g for _, g in gradients))


def test_whole_shares_are_exact() -> None:
    made = objectives(shares=(7, 7))
    found = gradient_noise(made, [at(made, 1)], [None], 7, 5)
    assert (found.Q.value, found.Q.uncertainty, found.Q.how) == (0, None, "exact")
    assert found.variance(7) == (0, 0)
    part = gradient_noise(made, [at(made, 1)], [None], 6, 5)
    assert part.Q.value > 0
    assert part.Q.how.startswith("estimated at 1 point, 5 minibatches")


def test_it_is_the_same_again() -> None:
    made = objectives(0.3)
    X = at(made, 1)
    before = torch.get_rng_state()
    one, other = (gradient_noise(made, [X], [None], 4, 6, seed=2) for _ in range(2))
    assert one == other
    assert (torch.get_rng_state() == before).all()
    assert gradient_noise(made, [X], [None], 4, 6, seed=3) != one


@pytest.mark.parametrize("mixing", [False, True])
def test_dropout_biases(mixing: bool) -> None:
    """Of a linear layer under mean squares it is known: E g = grad f + p/(1-p) diag(M) w."""
    p, random = 0.25, np.random.default_rng(4)
    x, y = (
        random.standard_normal((30, 3)).astype("f4"),
        random.standard_normal((30, 1)).astype("f4"),
    )
    model = nn.Sequential(nn.Dropout(p), nn.Linear(3, 1, bias=False))
    one = Objective(in_float64(model), functional.mse_loss, ArraySamples(x, y))
    w = np.array([1.5, -1.0, 2.0])
    push = np.array([[0.5, 1.0, -2.0]]) if mixing else None
    found = gradient_noise([one], [w[None]], [push], 30, 3000)
    diagonal = 2 * (x.astype(float) ** 2).mean(0) * w * p / (1 - p)
    V = one.gradient(w)[1] + (0 if push is None else push[0])
    E = V + diagonal
    assert found.zeta_1.value == pytest.approx(E @ V / (V @ V), rel=0.05)
    assert found.zeta_2.value == pytest.approx(np.sqrt(E @ E / (V @ V)), rel=0.05)
    # With few draws their own noise is taken off: right in the mean.
    few = [gradient_noise([one], [w[None]], [push], 3, 4, seed=i).at[0] for i in range(300)]
    lengths = np.array([p.length**2 for p in few])
    error = lengths.std() / np.sqrt(300)
    assert abs(lengths.mean() - E @ E / (V @ V)) < 4 * error
    unit = few[0].noises[0].unit
    assert unit / 3 / 4 / (V @ V) > 6 * error  # else the line above would not see it
    assert found.Q.value > 0  # of the whole share too
    assert not found.zeta_1.certain
    draws = [one.gradient(w, np.arange(30), training=True)[1] for _ in range(3000)]
    assert found.variance(30)[0] == pytest.approx(np.var(draws, axis=0).sum(), rel=0.15)


def test_which_models_change() -> None:
    cases: list[tuple[Any, bool, bool]] = [
        (nn.Linear(2, 2), False, False),
        (nn.Sequential(nn.Dropout(0.0)), False, False),
        (nn.Sequential(nn.Dropout2d(0.5)), True, False),
        (nn.Sequential(nn.BatchNorm1d(2)), False, True),
        (nn.Sequential(nn.LayerNorm(2)), False, False),
    ]
    for model, dropout, statistics in cases:
        assert (has_dropout(model), has_batch_statistics(model)) == (dropout, statistics)

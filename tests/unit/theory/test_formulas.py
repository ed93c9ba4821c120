"""The paper's bounds against what CDSGD does on quadratics, in float64 NumPy.

f_j(x) = 1/2 sum_i h_i (x_i - b_ji)^2, so gamma_m = max h, H_m = min h, and the minimiser of V
solves (h + (I - Pi)/alpha) X = h b, one linear system for each parameter.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs.mixing_matrix import MixingMatrix
from mpicdsgd.graphs.specs import graph_from_spec, mixing_from_spec
from mpicdsgd.theory import bounds, formulas
from mpicdsgd.theory.formulas import Constants

Floats = NDArray[np.float64]
GRAPHS = [(spec, n) for n in (2, 4, 5, 8, 16, 64) for spec in ("ring", "complete", "chain", "star")]
GRAPHS += [("torus", 16), ("hypercube", 8), ("regular:3,seed=1", 16), ("hypercube", 64)]


class Quadratic:
    """See the module; D = 3, one curvature for each parameter."""

    h = np.array([0.5, 1.0, 2.0])

    def __init__(self, n: int, seed: int = 0) -> None:
        self.b = np.random.default_rng(seed).normal(size=(n, 3))

    def loss(self, X: Floats) -> Floats:
        return np.asarray(0.5 * ((X - self.b) ** 2 * self.h).sum(axis=1))

    def gradient(self, X: Floats) -> Floats:
        return np.asarray((X - self.b) * self.h)

    def minimiser(self, Pi: Floats, alpha: float) -> Floats:
        n = len(Pi)
        A = (np.eye(n) - Pi) / alpha
        columns = [
            np.linalg.solve(A + h * np.eye(n), h * b) for h, b in zip(self.h, self.b.T, strict=True)
        ]
        return np.stack(columns, axis=1)

    def V(self, X: Floats, Pi: Floats, alpha: float) -> float:
        return formulas.lyapunov(self.loss(X), formulas.disagreement(X, Pi), alpha)


def mixing(spec: str, n: int, lazy: bool = True) -> MixingMatrix:
    made = mixing_from_spec("lazy:metropolis" if lazy else "metropolis", graph_from_spec(spec, n))
    assert isinstance(made, MixingMatrix)
    return made


def run(
    f: Quadratic, Pi: Floats, alphas: Floats, noise: float = 0.0, seed: int = 0
) -> list[Floats]:
    rng = np.random.default_rng(seed)
    X = [np.zeros_like(f.b)]
    for alpha in alphas:
        g = f.gradient(X[-1]) + noise * rng.normal(size=f.b.shape)
        X.append(Pi @ X[-1] - alpha * g)
    return X


@pytest.mark.parametrize(("spec", "n"), GRAPHS)
@pytest.mark.parametrize("lazy", [True, False])
def test_theorem_1_holds_as_corrected(spec: str, n: int, lazy: bool) -> None:
    m, f = mixing(spec, n, lazy), Quadratic(n)
    condition = 15 if lazy else 14
    limit = formulas.largest_step(2.0, m.spectrum.lambda_n, condition=condition)
    assert limit > 0
    for alpha in (0.9 * limit, limit / 10):
        down = formulas.descent(alpha, Constants(gamma_m=2.0, H_m=0.5), m.spectrum)
        sufficient = 2.0 * alpha + 1 - m.spectrum.lambda_n <= 1 + 1e-12
        assert down.admitted == ("(15)" if sufficient else "(14)")
        lowest = f.V(f.minimiser(m.Pi, alpha), m.Pi, alpha)
        excess = np.array([f.V(X, m.Pi, alpha) - lowest for X in run(f, m.Pi, np.full(60, alpha))])
        bound = bounds.theorem_1(np.arange(61), excess[0], down).corrected
        assert (excess <= bound * (1 + 1e-9) + 1e-12 * excess[0]).all()
        # Not empty: V falls, and the bound with it.
        assert bound[-1] < bound[0]
        assert excess[-1] < excess[0]


@pytest.mark.parametrize(("spec", "n"), GRAPHS)
def test_no_metropolis_matrix_admits_a_step_by_15(spec: str, n: int) -> None:
    lambda_n = mixing(spec, n, lazy=False).spectrum.lambda_n
    assert formulas.largest_step(2.0, lambda_n) <= 1e-9
    assert formulas.largest_step(2.0, lambda_n, condition=14) > 0


@pytest.mark.parametrize("spec", ["ring", "complete"])
def test_theorem_1_as_printed_is_violated(spec: str) -> None:
    """notes: f_j = (x - b_j)^2/2, five agents, alpha = 0.05, no noise: at 58 of 58 steps."""
    m = mixing(spec, 5)
    f = Quadratic(5)
    f.h = np.ones(3)
    alpha = 0.05
    down = formulas.descent(alpha, Constants(gamma_m=1.0, H_m=1.0), m.spectrum)
    lowest = f.V(f.minimiser(m.Pi, alpha), m.Pi, alpha)
    excess = np.array([f.V(X, m.Pi, alpha) - lowest for X in run(f, m.Pi, np.full(59, alpha))])
    bound = bounds.theorem_1(np.arange(1, 59), excess[1], down)
    second_line = down.second_line ** np.arange(1, 59) * excess[1]
    assert (excess[2:] > second_line).sum() == 58
    # The first line, with H_hat's factor 1/2, takes a few steps longer on the ring.
    assert (excess[2:] > bound.printed).sum() >= 50
    assert (excess[-40:] > bound.printed[-40:]).all()
    assert (excess[2:] <= bound.corrected * (1 + 1e-9)).all()
    assert down.second_line < down.rate.printed  # the two printed lines are not the same


def test_theorem_1_holds_in_the_mean_with_noise() -> None:
    m, f, noise, alpha = mixing("ring", 5), Quadratic(5), 0.3, 0.05
    constants = Constants(gamma_m=2.0, H_m=0.5, Q=noise**2 * f.b.size)
    down = formulas.descent(alpha, constants, m.spectrum)
    lowest = f.V(f.minimiser(m.Pi, alpha), m.Pi, alpha)
    runs = np.array([[f.V(X, m.Pi, alpha) - lowest
                      for X in run(f, m.Pi, np.full(250, alpha), noise, seed)]
                     for seed in range(200)])  # fmt: skip
    bound = bounds.theorem_1(np.arange(251), runs[0, 0], down).corrected
    half_width = 1.96 * runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
    assert (runs.mean(axis=0) <= bound * (1 + 1e-9) + half_width).all()
    # The noise is seen: without its term the bound fails.
    assert runs.mean(axis=0)[-1] > down.rate.corrected**250 * runs[0, 0] + half_width[-1]


@pytest.mark.parametrize(("spec", "n"), GRAPHS)
def test_proposition_1_holds_with_the_slowest_mode(spec: str, n: int) -> None:
    m, f = mixing(spec, n, lazy=False), Quadratic(n)
    alpha = 0.02
    states = run(f, m.Pi, np.full(400, alpha))
    L = max(float(np.linalg.norm(f.gradient(X))) for X in states)
    apart = np.array([np.linalg.norm(X - X.mean(axis=0)) for X in states])
    radius = formulas.consensus_radius(alpha, L, m.spectrum).corrected
    assert (apart <= radius * (1 + 1e-9)).all()
    along = bounds.consensus_bound(np.full(400, alpha), L, m.spectrum)
    assert (apart <= along * (1 + 1e-9) + 1e-15).all()
    assert along[-1] <= radius * (1 + 1e-9)


@pytest.mark.parametrize(("spec", "n"), [("ring", 5), ("chain", 8), ("star", 16), ("torus", 16)])
def test_at_the_fixed_point_proposition_1_is_within_a_known_factor(spec: str, n: int) -> None:
    m, f, alpha = mixing(spec, n), Quadratic(n), 0.02
    X = f.minimiser(m.Pi, alpha)
    G = f.gradient(X)
    apart = float(np.linalg.norm(X - X.mean(axis=0)))
    spread = float(np.linalg.norm(G - G.mean(axis=0)))
    low, high = formulas.fixed_point_radii(alpha, spread, m.spectrum)
    assert low * (1 - 1e-9) <= apart <= high * (1 + 1e-9)


def test_theorem_2_holds_with_measured_constants_where_f_is_not_convex() -> None:
    """f_j(x) = sum log(1 + (x - b_j)^2): curvature between -1/4 and 2."""
    m, alpha = mixing("ring", 5), 0.02
    b = np.random.default_rng(1).normal(size=(5, 3)) * 3
    X, V, squared = np.zeros((5, 3)), [], []
    for _ in range(300):
        G = 2 * (X - b) / (1 + (X - b) ** 2)
        V.append(formulas.lyapunov(np.log1p((X - b) ** 2).sum(axis=1),
                                 formulas.disagreement(X, m.Pi), alpha))  # fmt: skip
        squared.append(float((formulas.lyapunov_gradient(G, X, m.Pi, alpha) ** 2).sum()))
        X = m.Pi @ X - alpha * G
    down = formulas.descent(alpha, Constants(gamma_m=2.0), m.spectrum)
    bound = bounds.theorem_2(np.arange(1, 301), V[0], down)
    assert (np.cumsum(squared) <= bound).all()


def test_diminishing_steps_reach_the_optimum_where_a_fixed_step_stalls() -> None:
    m, f, n = mixing("ring", 5), Quadratic(5), 5
    optimum = f.b.mean(axis=0)
    alphas = 0.4 / (np.arange(20000) + 1) ** 0.6
    constants = Constants(gamma_m=2.0, H_m=0.5)
    states = run(f, m.Pi, alphas)
    L = max(float(np.linalg.norm(f.gradient(X))) for X in states)
    apart = np.array([np.linalg.norm(X - X.mean(axis=0)) for X in states])
    distance = np.array([np.linalg.norm(X.mean(axis=0) - optimum) for X in states])
    c = bounds.consensus_bound(alphas, L, m.spectrum)
    d = bounds.distance_bound(alphas, c, constants, n, float(distance[0]))
    assert (apart <= c * (1 + 1e-9)).all()
    assert (distance <= d * (1 + 1e-9)).all()
    # Both bounds fall as alpha_k does, in the end.
    assert d[-1] / d[10000] == pytest.approx(alphas[-1] / alphas[10000], rel=0.1)
    assert c[-1] / c[10000] == pytest.approx(alphas[-1] / alphas[10000], rel=0.1)
    fixed = run(f, m.Pi, np.full(20000, 0.1))[-1]
    worst = float(np.linalg.norm(fixed - optimum, axis=1).max())
    assert worst > 20 * float(np.linalg.norm(states[-1] - optimum, axis=1).max())
    # Averaged over steps, the gradient's bound for functions that need not be convex holds too.
    f_s = [float(f.loss(np.tile(X.mean(axis=0), (n, 1))).mean()) for X in states]
    gradient = [float(((X.mean(axis=0) - optimum) * f.h) @ ((X.mean(axis=0) - optimum) * f.h))
                for X in states[:-1]]  # fmt: skip
    least = float(f.loss(np.tile(optimum, (n, 1))).mean())
    drop = f_s[0] - least
    seen = np.cumsum(alphas * np.array(gradient))
    assert (seen <= bounds.gradient_bound(alphas, c, constants, n, drop)).all()


def test_the_distance_bound_holds_with_noise() -> None:
    m, f, n, noise = mixing("chain", 4), Quadratic(4), 4, 0.5
    alphas = 0.4 / (np.arange(600) + 1) ** 0.75
    squared, gradients = [], []
    for seed in range(200):
        states = run(f, m.Pi, alphas, noise, seed)
        squared.append([((X.mean(axis=0) - f.b.mean(axis=0)) ** 2).sum() for X in states])
        gradients.append([(f.gradient(X) ** 2).sum() for X in states])
    L = float(np.sqrt(np.mean(gradients, axis=0).max() + noise**2 * f.b.size))
    c = bounds.consensus_bound(alphas, L, m.spectrum)
    constants = Constants(gamma_m=2.0, H_m=0.5, Q=noise**2 * f.b.size)
    d = bounds.distance_bound(alphas, c, constants, n, float(np.sqrt(squared[0][0])))
    mean = np.mean(squared, axis=0)
    half_width = 1.96 * np.std(squared, axis=0, ddof=1) / np.sqrt(200)
    assert (mean <= d**2 * (1 + 1e-9) + half_width).all()


@pytest.mark.parametrize(("spec", "n"), [("ring", 5), ("complete", 5), ("chain", 8)])
def test_step_limits_are_those_of_the_conditions(spec: str, n: int) -> None:
    for lazy in (True, False):
        ln = mixing(spec, n, lazy).spectrum.lambda_n
        for condition, c in ((14, 2.0), (15, 1.0)):
            alpha = formulas.largest_step(3.0, ln, zeta_1=0.9, Q_m=1.1, condition=condition)
            if alpha > 0:  # at the limit the condition as printed holds with equality
                assert alpha == pytest.approx(c * 0.9 / (formulas.smoothness(3.0, ln, alpha) * 1.1))


def test_disagreement_and_gradient_of_V_are_their_formulas() -> None:
    m = mixing("star", 5, lazy=False)
    X = np.random.default_rng(3).normal(size=(5, 7))
    assert formulas.disagreement(X, m.Pi) == pytest.approx(float((X * (X - m.Pi @ X)).sum()))
    # Near each other the differences keep their digits.
    near = np.float64(1e4) + 1e-7 * X
    exact = formulas.disagreement(near - 1e4, m.Pi)
    assert formulas.disagreement(near, m.Pi) == pytest.approx(exact, rel=1e-4)
    f, alpha, E = Quadratic(5), 0.1, np.zeros((5, 3))
    Y = np.random.default_rng(4).normal(size=(5, 3))
    grad = formulas.lyapunov_gradient(f.gradient(Y), Y, m.Pi, alpha)
    E[2, 1] = 1e-6
    slope = (f.V(Y + E, m.Pi, alpha) - f.V(Y - E, m.Pi, alpha)) / 2e-6
    assert slope == pytest.approx(grad[2, 1], rel=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gamma_m": 0.0}, "gamma_m = 0: it must be a number > 0"),
        ({"gamma_m": 1.0, "H_m": 2.0}, "H_m = 2 is larger than gamma_m = 1"),
        ({"gamma_m": 1.0, "Q": -1.0}, "Q = -1: a variance"),
        ({"gamma_m": 1.0, "Q_m": 0.5}, "Q_m = 0.5 is below"),
        ({"gamma_m": float("nan")}, "gamma_m = nan"),
    ],
)
def test_constants_that_no_objective_has_are_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Constants(**given)


def test_steps_beyond_a_bound_are_refused() -> None:
    constants = Constants(gamma_m=2.0, H_m=0.5)
    with pytest.raises(UserError, match=r"step 1 has the size 0.9.*2/\(gamma_m \+ H_m\) = 0.8"):
        bounds.distance_bound([0.1, 0.9], [0.0, 0.0], constants, 2, 1.0)
    with pytest.raises(UserError, match=r"step 0 has the size 0.6.*1/gamma_m = 0.5"):
        bounds.gradient_bound([0.6], [0.0], constants, 2, 1.0)


def test_bounds_on_gradients_are_their_formulas() -> None:
    """(18) as printed, under (15); and the derived one, term by term."""
    m, alpha, steps = mixing("ring", 5), 0.05, np.array([1.0, 10.0, 100.0])
    constants = Constants(gamma_m=2.0, Q=0.7, Q_m=1.1, zeta_1=0.9)
    down = formulas.descent(alpha, constants, m.spectrum)
    assert down.admitted == "(15)"
    gamma_hat = 2.0 + (1 - m.spectrum.lambda_n) / alpha
    printed = gamma_hat * steps * alpha * 0.7 / 0.9 + 2 * 3.0 / (0.9 * alpha)
    assert bounds.theorem_2(steps, 3.0, down) == pytest.approx(printed)
    alphas, apart = np.array([0.3, 0.2]), np.array([1.0, 2.0, 9.0])
    first = 2 * 3.0 + 0.3 * 4.0 * 1.0 / 5 + 2.0 * 0.7 / 25 * 0.09
    second = first + 0.2 * 4.0 * 4.0 / 5 + 2.0 * 0.7 / 25 * 0.04
    found = bounds.gradient_bound(alphas, apart, constants, 5, 3.0)
    assert found == pytest.approx([first, second])

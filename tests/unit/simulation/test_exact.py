"""The exact twin against each algorithm's formula in dense NumPy, and facts that are known of them.

N, D    agents and parameters
H, B    float64 (N, D, D) and (N, D): f_j(x) = (x - b_j)' H_j (x - b_j) / 2, other ones for each
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mpicdsgd import Graph
from mpicdsgd.algorithms.contract import Algorithm, Circumstances, Context
from mpicdsgd.algorithms.registry import algorithms
from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs import mixing_rules
from mpicdsgd.graphs.mixing_cycle import Mixing, mixing_cycle
from mpicdsgd.graphs.specs import graph_from_spec, mixing_from_spec
from mpicdsgd.simulation.exact import ExactRows

Array = NDArray[np.float64]
D, ALPHA, MU, DECAY = 3, 0.05, 0.8, 0.1


class Quadratics:
    """f_j of N agents, with noise that depends on the step."""

    def __init__(self, n: int, noise: float = 0.0) -> None:
        rng = np.random.default_rng(n)
        A = rng.standard_normal((n, D, D)) / 2
        self.H = A @ A.transpose(0, 2, 1) + 0.5 * np.eye(D)
        self.B, self.start = rng.standard_normal((2, n, D))
        self.n, self.noise = n, noise

    def gradient(self, k: int, X: Array) -> Array:
        rng = np.random.default_rng([k, 1])
        G: Array = np.einsum("nij,nj->ni", self.H, X - self.B)
        return G + self.noise * rng.standard_normal(X.shape)

    @property
    def optimum(self) -> Array:
        pulls = np.einsum("nij,nj->i", self.H, self.B)
        found: Array = np.linalg.solve(self.H.sum(axis=0), pulls)
        return found


def mixing_of(n: int, topology: str = "ring", mixing: str = "metropolis") -> Mixing:
    return mixing_from_spec(mixing, graph_from_spec(topology, n))


def directed(n: int = 6) -> Mixing:
    """A ring one way, with chords that make the degrees unequal; column-stochastic weights."""
    edges = [(j, (j + 1) % n) for j in range(n)] + [(0, 2), (0, 3), (4, 1)]
    return mixing_rules.out_degree(Graph.from_edges(n, edges, directed=True))


def make(
    name: str | type[Algorithm],
    problem: Quadratics,
    mixing: Mixing,
    run: Circumstances | None = None,
    **settings: Any,
) -> ExactRows:
    kind = algorithms()[name] if isinstance(name, str) else name
    made = kind.Settings(lr=settings.pop("lr", ALPHA), **settings)
    samples = np.ones(problem.n, np.int64)
    circumstances = run or Circumstances(agents=problem.n, samples=samples)
    algorithm = kind.of(made)(made, circumstances)
    return ExactRows(problem.start, mixing, algorithm, problem.gradient)


def near(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    expected = np.asarray(expected)
    assert np.abs(np.asarray(found) - expected).max() <= tolerance * max(1, np.abs(expected).max())


def dense(
    problem: Quadratics, Pi: list[Array], steps: int, form: str, tau: int = 1, decay: float = 0.0
) -> tuple[Array, Array]:
    X, V = problem.start.copy(), np.zeros_like(problem.start)
    for k in range(steps):
        at = X + MU * V if form == "look-ahead" else X
        A = ALPHA * (problem.gradient(k, at) + decay * at)
        V = MU * V - A
        for r in range(k * tau, (k + 1) * tau):
            X = Pi[r % len(Pi)] @ X
        X = X + {"none": -A, "polyak": V, "nesterov": MU * V - A, "look-ahead": V}[form]
    return X, V


FORMS: dict[str, dict[str, Any]] = {
    "none": {},
    "polyak": {"momentum": MU, "nesterov": False},
    "nesterov": {"momentum": MU, "nesterov": True},
    "look-ahead": {"momentum": MU, "nesterov": "look-ahead"},
}
GRAPHS = [
    ("ring", "metropolis"), ("star", "metropolis"), ("complete", "uniform"), ("expo", "one-peer"),
    ("ring", "matchings"), ("expo", "uniform"),
]  # fmt: skip


@pytest.mark.parametrize("tau", [1, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("topology", "rule"), GRAPHS)
def test_consensus(topology: str, rule: str, form: str, tau: int) -> None:
    """CDSGD, i-CDSGD and the three forms of CDMSGD, on graphs that change, too."""
    problem, mixing = Quadratics(6, noise=0.3), mixing_of(6, topology, rule)
    name = "cdmsgd" if form != "none" else ("cdsgd" if tau == 1 else "icdsgd")
    exact = make(name, problem, mixing, weight_decay=DECAY, rounds=tau, **FORMS[form])
    X, V = dense(problem, [t.Pi for t in mixing.turns], 30, form, tau, DECAY)
    near(exact.run(30), X)
    if form != "none":
        near(exact.v, V)
        near(exact.y, X + MU * V if form == "look-ahead" else X)


def test_one_agent_alone() -> None:
    problem = Quadratics(1)
    X, _ = dense(problem, [np.eye(1)], 9, "none")
    for name in ("cdsgd", "push-sum", "gradient-tracking", "sgd"):
        near(make(name, problem, mixing_of(1)).run(9), X)


@pytest.mark.parametrize(("topology", "rule"), GRAPHS)
def test_gradient_tracking(topology: str, rule: str) -> None:
    """And mean(Y) = mean(G) after every step."""
    problem, mixing = Quadratics(6, noise=0.3), mixing_of(6, topology, rule)
    exact = make("gradient-tracking", problem, mixing, weight_decay=DECAY)
    X, Y, before = problem.start, np.zeros_like(problem.start), np.zeros_like(problem.start)
    for k in range(30):
        Pi = mixing.turns[k % len(mixing.turns)].Pi
        G = problem.gradient(k, X) + DECAY * X
        # As it is sent: the difference is in what one has, not in what the neighbours have seen.
        Y, X, before = Pi @ Y + G - before, Pi @ X, G
        X = X - ALPHA * Y
        near(exact.run(1), X)
        near(exact["y"], Y)
        near(exact["y"].mean(dim=0), G.mean(axis=0), 1e-13)
        near(exact["gradient"], G)


@pytest.mark.parametrize("where", ["directed", "one-peer", "cycle"])
def test_push_sum(where: str) -> None:
    problem = Quadratics(6, noise=0.3)
    mixing = directed() if where == "directed" else mixing_of(6, "expo", "one-peer")
    if where == "cycle":
        matrices = [mixing_of(6).turns[0].Pi, mixing_of(6, "star").turns[0].Pi]
        mixing = mixing_cycle(matrices, graph_from_spec("complete", 6))
    exact = make("push-sum", problem, mixing, weight_decay=DECAY)
    X, w = problem.start.copy(), np.ones(6)
    for k in range(30):
        P, Z = mixing.turns[k % len(mixing.turns)].Pi, X / w[:, None]
        X, w = P @ (X - ALPHA * (problem.gradient(k, Z) + DECAY * Z)), P @ w
        near(exact.run(1), X / w[:, None])
        near(exact.number("weight"), w)
        assert abs(w.sum() - 6) <= 1e-13


@pytest.mark.parametrize("form", FORMS)
def test_mean_gradients(form: str) -> None:
    problem = Quadratics(5, noise=0.3)
    name = "sgd" if form == "none" else "msgd"
    exact = make(name, problem, mixing_of(5), weight_decay=DECAY, **FORMS[form])
    x, v = problem.start[0], np.zeros(D)
    for k in range(20):
        at = x + MU * v if form == "look-ahead" else x
        a = ALPHA * (problem.gradient(k, np.tile(at, (5, 1))).mean(axis=0) + DECAY * at)
        v = MU * v - a
        x = x + {"none": -a, "polyak": v, "nesterov": MU * v - a, "look-ahead": v}[form]
    near(exact.run(20), np.tile(x, (5, 1)))


@pytest.mark.parametrize(("fraction", "beta"), [(1.0, 0.0), (0.5, 0.0), (0.5, 0.9)])
def test_federated_average(fraction: float, beta: float) -> None:
    problem, samples = Quadratics(6, noise=0.3), np.arange(6) + 1
    run = Circumstances(steps_per_epoch=3, samples=samples, seed=5, agents=6)
    settings: dict[str, Any] = {"fraction": fraction, "server_momentum": beta, "local_epochs": 2}
    exact = make("fedavg", problem, mixing_of(6), run, **settings)
    X, s, m = np.tile(problem.start[0], (6, 1)), problem.start[0], np.zeros(D)
    for k in range(20):
        draw = np.random.Generator(np.random.PCG64([5, k // 6]))
        chosen = np.sort(draw.permutation(6)[: int(fraction * 6)])
        X[chosen] -= ALPHA * problem.gradient(k, X)[chosen]
        if (k + 1) % 6 == 0:
            shares = samples[chosen] / samples[chosen].sum()
            m = beta * m + shares @ (X[chosen] - s)
            s = s + m
            X[:] = s
        near(exact.run(1), X)
    near(exact.algorithm.centre(exact), s)


@pytest.mark.parametrize("period", [1, 4])
@pytest.mark.parametrize("name", ["easgd", "eamsgd"])
def test_elastic_averaging(name: str, period: int) -> None:
    problem = Quadratics(5, noise=0.3)
    more: dict[str, Any] = {"momentum": MU} if name == "eamsgd" else {}
    exact = make(name, problem, mixing_of(5), period=period, elasticity=0.125, **more)
    X, c, V = problem.start, problem.start[0], np.zeros_like(problem.start)
    mu = more.get("momentum", 0.0)
    for k in range(20):
        V = mu * V - ALPHA * problem.gradient(k, X + mu * V)
        e = 0.125 if k % period == 0 else 0.0
        X, c = X + V + e * (c - X), c + e * (X - c).sum(axis=0)
        near(exact.run(1), X)
        near(exact["centre"], np.tile(c, (5, 1)))


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_gossip_in_pairs(p: float) -> None:
    problem = Quadratics(6, noise=0.3)
    exact = make("gossip", problem, mixing_of(6, "star"), Circumstances(seed=3, agents=6),
                 probability=p, weight_decay=DECAY)  # fmt: skip
    algorithm: Any = exact.algorithm
    X = problem.start
    for k in range(20):
        X = X - ALPHA * (problem.gradient(k, X) + DECAY * X)
        partners = algorithm.partners(exact, k + 1)
        met = np.where(partners >= 0, partners, np.arange(6))
        X = (X + X[met]) / 2
        near(exact.run(1), X)


# What is known of them


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_has_cdsgds_fixed_point_at_a_larger_step(nesterov: Any) -> None:
    """Polyak's and Nesterov's: with look-ahead gradients are taken elsewhere."""
    problem, mixing = Quadratics(8), mixing_of(8)
    momentum = make("cdmsgd", problem, mixing, lr=0.02, momentum=MU, nesterov=nesterov).run(3000)
    plain = make("cdsgd", problem, mixing, lr=0.02 / (1 - MU)).run(3000)
    near(momentum, plain, 1e-12)
    assert np.abs(plain - plain.mean(axis=0)).max() > 0.1, "the agents do not agree"


@pytest.mark.parametrize(("topology", "rule"), [("ring", "metropolis"), ("expo", "one-peer")])
def test_gradient_tracking_reaches_the_optimum(topology: str, rule: str) -> None:
    problem, mixing = Quadratics(8), mixing_of(8, topology, rule)
    near(make("gradient-tracking", problem, mixing).run(3000), [problem.optimum] * 8, 1e-10)
    off = make("cdsgd", problem, mixing).run(3000) - problem.optimum
    assert np.abs(off).max() > 1e-2, "where CDSGD does not"


class NoWeights(algorithms()["push-sum"]):  # type: ignore[misc]
    """The same steps as if all weights were 1."""

    def step(self, ctx: Context) -> None:
        ctx.update(gradient=True)
        ctx.publish()
        ctx.update(mix=ctx.received(), publish=False)


def test_push_sum_finds_the_mean_on_a_directed_graph() -> None:
    problem, mixing = Quadratics(6), directed()
    with_weights = make("push-sum", problem, mixing, lr=0.0)
    mean = problem.start.mean(axis=0)
    near(with_weights.run(400), [mean] * 6, 1e-13)
    w = with_weights.number("weight")
    assert w.sum() == pytest.approx(6, abs=1e-13)
    assert w.max() - w.min() > 0.3
    # x, which the weights correct, is off, and so is mixing as if P's rows summed to 1.
    x = with_weights.x.numpy() * w[:, None]
    assert np.abs(x - mean).max() > 0.1
    assert np.abs(make(NoWeights, problem, mixing, lr=0.0).run(400) - mean).max() > 0.01


def test_push_sum_on_a_regular_graph_is_adapt_then_combine() -> None:
    problem, mixing = Quadratics(8, noise=0.3), mixing_of(8, "expo", "out-degree")
    exact = make("push-sum", problem, mixing)
    X = problem.start
    for k in range(30):
        X = mixing.turns[0].Pi @ (X - ALPHA * problem.gradient(k, X))
        near(exact.run(1), X)
        near(exact.number("weight"), np.ones(8), 1e-15)


# The interface


def test_step_sizes_may_change() -> None:
    problem, mixing = Quadratics(4), mixing_of(4)
    exact = make("cdsgd", problem, mixing)
    X = problem.start
    for k in range(8):
        exact.group["lr"] = ALPHA / (k + 1)
        X = mixing.turns[0].Pi @ X - ALPHA / (k + 1) * problem.gradient(k, X)
        near(exact.run(1), X)
    assert exact.steps == exact.step == 8


@pytest.mark.parametrize("name", sorted(algorithms()))
def test_every_synchronous_algorithm_runs(name: str) -> None:
    problem = Quadratics(4)
    if not algorithms()[name].synchronous:
        with pytest.raises(UserError, match=f"{name} is asynchronous"):
            make(name, problem, mixing_of(4))
        return
    exact = make(name, problem, mixing_of(4))
    X = exact.run(50)
    assert X.dtype == np.float64
    assert exact.x.dtype == torch.float64
    assert np.linalg.norm(X - problem.optimum) < np.linalg.norm(problem.start - problem.optimum)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rounds": 0}, "rounds"),
        ({"lr": -1.0}, "lr must be"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        make("cdsgd", Quadratics(3), mixing_of(3), **change).run(1)

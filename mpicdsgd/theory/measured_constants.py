"""The constants that the theorems need, for a run: `Rebuilt` in, `formulas.Constants` out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs.mixing_cycle import covered
from mpicdsgd.theory import formulas
from mpicdsgd.theory.curvature import Curvature, curvature
from mpicdsgd.theory.estimates import Estimate, Kind, points
from mpicdsgd.theory.gradient_noise import GradientNoise, gradient_noise
from mpicdsgd.theory.objective import Floats, Objective
from mpicdsgd.theory.rebuilt_run import Rebuilt


@dataclass(frozen=True)
class Effort:
    """How much is measured where nothing is exact.

    Attributes:
        points: at which; the first is the initial parameters, the last the averaged model of the
            newest checkpoint.
        draws: minibatches of each agent at each point.
        samples: of each agent, at most, for a network's Hessian.

    Raises UserError for what cannot be.
    """

    points: int = 2
    draws: int = 20
    samples: int = 1000

    def __post_init__(self) -> None:
        for option, value, least in (
            ("--points", self.points, 1),
            ("--batches", self.draws, 2),
            ("--samples", self.samples, 1),
        ):
            if value < least:
                raise UserError(f"{option} {value}: it must be at least {least}")


@dataclass(frozen=True)
class Found:
    """What was found of a run.

    Attributes:
        curvatures: of each agent.
        gamma_m, H_m: the largest and the smallest of theirs.
        noise: of the gradients.
        places: where it was measured, in words.
    """

    curvatures: tuple[Curvature, ...]
    gamma_m: Estimate
    H_m: Estimate
    noise: GradientNoise
    places: tuple[str, ...]

    @property
    def lowest(self) -> float | None:
        """The lowest eigenvalue of a Hessian found at a point; None where none was looked for."""
        return min((c.lowest for c in self.curvatures if c.lowest is not None), default=None)

    @property
    def constants(self) -> formulas.Constants:
        """With Q_V = 0. Raises UserError where the theory has no such constants."""
        zeta_1 = self.noise.zeta_1.value
        if not zeta_1 > 0:
            raise UserError(
                f"zeta_1 = {zeta_1:.3g}: the mean minibatch gradient does not descend on V"
            )
        zeta_2 = max(self.noise.zeta_2.value, zeta_1)
        return formulas.Constants(
            self.gamma_m.value,
            min(self.H_m.value, self.gamma_m.value),
            self.noise.Q.value,
            zeta_2**2,
            zeta_1,
        )

    @property
    def exact_gradients(self) -> bool:
        """Whether there is no noise at all, and so one run says what the theorem says."""
        return self.noise.Q.value == 0 and self.noise.Q.certain


def find(run: Rebuilt, effort: Effort) -> Found:
    """Estimate all of them. Local; the longest part is a network's Hessian.

    Raises:
        UserError: an operation of the model has no second derivative.
    """
    places, points_PND = _points(run, effort.points)
    curvatures = tuple(
        curvature(
            objective, [X[j] for X in points_PND], thinned=_thinned(objective, effort.samples)
        )
        for j, objective in enumerate(run.objectives)
    )
    gamma = max((c.gamma for c in curvatures), key=lambda e: e.value)
    if any(c.kind == "network" for c in curvatures):
        most = max(len(o.samples) for o in run.objectives)
        if effort.samples < most:
            thinned = f"{effort.samples} of up to {most} samples"
            gamma = replace(gamma, detail="; ".join(filter(None, (gamma.detail, thinned))))
    noise = gradient_noise(
        run.objectives,
        points_PND,
        [_mixing_gradient(run, X) for X in points_PND],
        min(run.batches),
        effort.draws,
        run.config.run.seed,
    )
    H = min((c.H for c in curvatures), key=lambda e: e.value)
    return Found(curvatures, gamma, H, noise, places)


def _points(run: Rebuilt, count: int) -> tuple[tuple[str, ...], list[Floats]]:
    """Between the initial parameters and the newest averaged model, both ends included."""
    if not run.saved:
        return ("initial parameters",), [run.start]
    last = run.saved[0]
    mean = last.X_ND.mean(axis=0)
    names, found = [], []
    for t in np.linspace(0, 1, count) if count > 1 else [1.0]:
        if t == 0:
            names.append("initial parameters")
            found.append(run.start)
        elif t == 1:
            names.append(f"averaged model of step {last.step}")
            found.append(np.broadcast_to(mean, last.X_ND.shape))
        else:
            names.append(f"{t:.3g} of the way between")
            found.append((1 - t) * run.start + t * mean)
    return tuple(names), found


def _thinned(objective: Objective, most: int) -> Objective:
    """With every so many of its samples for the Hessian, where there are more than ``most``."""
    n = len(objective.samples)
    return (
        objective if n <= most else replace(objective, only=np.linspace(0, n - 1, most).astype(int))
    )


def _mixing_gradient(run: Rebuilt, X_ND: Floats) -> Floats | None:
    """(I - Pi) X / alpha; None where all agents are alike, and where the theory has no V."""
    if not covered(run.mixing) or np.ptp(X_ND, axis=0).max() == 0:
        return None
    apart = X_ND - run.mixing.turns[0].Pi @ X_ND
    return np.asarray(apart / run.config.optim.lr)


def gradient_bound(run: Rebuilt, noise: GradientNoise | None) -> Estimate | None:
    """L: from the trace, which has every step; else from the points; None where neither is."""
    if run.trace is not None:
        largest = float(np.sqrt(run.trace.gradient.max()))
        return Estimate(largest, None, Kind.BOUND, "the largest in the run's trace")
    if noise is None:
        return None
    largest = max(one.squared for one in noise.at) + noise.Q.value
    return Estimate(float(np.sqrt(largest)), None, Kind.ESTIMATED, points(len(noise.at)))

"""Bounds on a whole run: the paper's Theorems 1 and 2, and what holds where steps diminish.

Notation and errata: at the top of ``formulas.py``. The paper counts from x_1; here x_0 is where
a run, or the part of it that is looked at, begins, and ``steps`` are taken since.

For steps that diminish the paper refers to a supplement that is not to be had, and its V changes
with alpha. The three bounds at the end are derived here instead, from the update itself:

    X_k+1 - 1 s_k+1 = (Pi - 11^T/N) X_k - alpha_k (g_k - 1 mean g_k)         the agents' distance
    s_k+1           = s_k - alpha_k mean g_k                                  their mean
    |mean_j grad f_j(x_j) - grad f(s)| <= gamma_m |X - 1 s| / sqrt(N),        f = mean_j f_j

all in root mean square over the noise, with the noise of different agents independent.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs.mixing_matrix import Spectrum
from mpicdsgd.theory.formulas import Constants, Descent, Floats, Versions, slowest_mode


def theorem_1(steps: npt.ArrayLike, excess: float, descent: Descent) -> Versions[Floats]:
    """Bounds on E V(x_k) - V* for strongly convex f_j and a fixed step, shape as ``steps``.

    The printed one is the first line of (17), with its sum of k terms; the corrected one has the
    k - 1 terms that the proof gives, and NaN where alpha does not meet (14).

    Args:
        steps: k - 1, steps taken since V was ``excess`` above V*.
        excess: V(x_1) - V*.
        descent: of alpha, from `theory.formulas.descent`.

    Source: Theorem 1, (17).
    """
    m = np.asarray(steps, dtype=np.float64)
    printed, corrected = descent.rate.printed, descent.rate.corrected
    return Versions(
        printed=printed**m * excess + descent.noise * _powers(printed, m + 1),
        corrected=corrected**m * excess + descent.noise * _powers(corrected, m),
    )


def theorem_2(steps: npt.ArrayLike, drop: float, descent: Descent) -> Floats:
    """Bounds on E sum |grad V(x_k)|^2 over the first ``steps`` iterates, for a fixed step.

    No convexity is asked for. Under (15) as printed; where only (14) holds, with Lemma 2's own
    constant; NaN where neither does.

    Args:
        drop: V(x_1) - V_inf; with losses that are never negative V_inf >= 0, so V(x_1) will do.

    Source: Theorem 2, (18).
    """
    m = np.asarray(steps, dtype=np.float64)
    return (drop + m * descent.noise) / descent.decrease


def consensus_bound(
    alphas: npt.ArrayLike, L: float, spectrum: Spectrum, initial: float = 0.0
) -> Floats:
    """Bounds on |X_k - 1 s_k| (root mean square) for any step sizes; one more than ``alphas``.

    c_0 = initial, c_k+1 = beta c_k + alpha_k L. With a fixed step it rises to Proposition 1's
    radius; where alpha_k falls to 0 so does c_k, in the end as alpha_k L/(1 - beta). Derived here.

    Args:
        initial: |X_0 - 1 s_0|, 0 where all begin alike.
    """
    beta = slowest_mode(spectrum)
    bound = [initial]
    for alpha in np.asarray(alphas, dtype=np.float64):
        bound.append(beta * bound[-1] + float(alpha) * L)
    return np.array(bound)


def distance_bound(
    alphas: npt.ArrayLike, apart: npt.ArrayLike, constants: Constants, n: int, initial: float
) -> Floats:
    """Bounds on |s_k - x*| (root mean square), x* the minimiser of mean_j f_j; strongly convex.

    d_0 = initial, d_k+1^2 = ((1 - alpha_k H_m) d_k + alpha_k gamma_m c_k/sqrt(N))^2
    + alpha_k^2 Q/N^2. With alpha_k = a/(k+1)^e and 1/2 < e < 1 it falls as alpha_k without noise,
    as its root with noise; for e = 1 if a H_m > 1. With a fixed step it stalls at O(alpha).
    Derived here.

    Args:
        alphas: step sizes, shape (K,), each at most 2/(gamma_m + H_m).
        apart: c_k from `consensus_bound`, or measured, shape (K,) or longer.
        n: number of agents N.

    Raises:
        UserError: a step size beyond the limit.
    """
    steps, c = np.asarray(alphas, dtype=np.float64), np.asarray(apart, dtype=np.float64)
    H, gamma = constants.H_m, constants.gamma_m
    _at_most(steps, 2 / (gamma + H), "2/(gamma_m + H_m)")
    bound = [initial]
    for alpha, c_k in zip(steps.tolist(), c[: len(steps)].tolist(), strict=True):
        moved = (1 - alpha * H) * bound[-1] + alpha * gamma * c_k / np.sqrt(n)
        bound.append(float(np.sqrt(moved**2 + alpha**2 * constants.Q / n**2)))
    return np.array(bound)


def gradient_bound(
    alphas: npt.ArrayLike, apart: npt.ArrayLike, constants: Constants, n: int, drop: float
) -> Floats:
    """Bounds on sum_(i<=k) alpha_i E|grad f(s_i)|^2, f = mean_j f_j, shape (K,); not convex.

    2 drop + sum alpha_i gamma_m^2 c_i^2/N + gamma_m Q/N^2 sum alpha_i^2. Where sum alpha diverges
    and sum alpha^2 does not, the smallest gradient therefore falls to 0. Derived here.

    Args:
        alphas: step sizes, shape (K,), each at most 1/gamma_m.
        apart: c_k from `consensus_bound`, or measured, shape (K,) or longer.
        n: number of agents N.
        drop: f(s_0) - inf f.

    Raises:
        UserError: a step size beyond the limit.
    """
    steps, c = np.asarray(alphas, dtype=np.float64), np.asarray(apart, dtype=np.float64)
    gamma = constants.gamma_m
    _at_most(steps, 1 / gamma, "1/gamma_m")
    from_distance = np.cumsum(steps * gamma**2 * c[: len(steps)] ** 2 / n)
    from_noise = gamma * constants.Q / n**2 * np.cumsum(steps**2)
    return np.asarray(2 * drop + from_distance + from_noise)


def _powers(rate: float, terms: Floats) -> Floats:
    """1 + rate + ... with so many ``terms``."""
    if rate == 1:
        return terms
    return np.asarray((1 - rate**terms) / (1 - rate))


def _at_most(alphas: Floats, limit: float, formula: str) -> None:
    too_large = np.flatnonzero(alphas > limit * (1 + 1e-12))
    if len(too_large):
        k = int(too_large[0])
        raise UserError(
            f"step {k} has the size {alphas[k]:g}, but the bound holds up to {formula} = {limit:g}"
        )

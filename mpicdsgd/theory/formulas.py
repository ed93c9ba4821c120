"""The paper's convergence theory (arXiv 1706.07880, section 4), as printed and corrected.

    N, D      agents; parameters of each
    X_ND      all parameters, row j: agent j's; s their mean over agents
    f_j       agent j's objective: the mean loss over its samples, and lambda/2 |x|^2 with decay
    Pi        symmetric mixing matrix; lambda_2 its second largest eigenvalue, lambda_N its smallest
    beta      max(|lambda_2|, |lambda_N|), so the spectral gap is 1 - beta
    alpha     step size
    gamma_m   largest smoothness constant of any f_j;  H_m  smallest strong convexity constant
    g         stacked stochastic gradient, shape (N, D);  L >= sqrt(E |g|^2), Frobenius norm
    Q, Q_m    E|g - E g|^2 <= Q + Q_V |grad V|^2,  Q_m = Q_V + zeta_2^2        Assumption 3
    zeta_1,2  E g points along grad V: both are 1 where g is unbiased          Assumption 3
    V         sum_j f_j(x_j) + 1/(2 alpha) |X|^2_(I - Pi)                      eq. (9)

CDSGD is a gradient step of size alpha on V, eq. (7). The paper writes its formulas for D = 1; all
norms here are over agents and parameters, for which the same proofs hold. The paper's factor N/n
belongs to sums over samples, which are means here.

Where the printed theory is wrong a function gives both versions. Errata:

1. I - Pi has the null vector 1, so its smallest eigenvalue is 0 and V is H_m-strongly convex, not
   H_m + (1 - lambda_2)/(2 alpha). The two printed lines of (17) also differ by a factor 1/2 in it.
2. (15) admits a step only where lambda_N > 1 - zeta_1/Q_m, which few matrices in use have. The
   descent that Theorems 1 and 2 rest on (Lemma 2) needs (14) alone, with another constant.
3. Proposition 1 needs beta where an eigenvalue below 0 is the largest in modulus, and a start from
   equal parameters, or a term for it.
4. The minimiser of V is not that of sum f_j, so Remark 2 compares with the wrong value: with a
   fixed step the agents stop O(alpha) away from the optimum.

What the paper leaves to its supplement (steps that diminish) is derived in `bounds.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs.mixing_matrix import Matrix, Spectrum

Floats = npt.NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True)
class Versions(Generic[T]):
    """A figure as the paper prints it, and as it is right."""

    printed: T
    corrected: T


@dataclass(frozen=True)
class Constants:
    """What the theorems ask of the objectives and of the gradients; see the module.

    Raises UserError for values that no objective has.
    """

    gamma_m: float
    H_m: float = 0.0
    Q: float = 0.0
    Q_m: float = 1.0
    zeta_1: float = 1.0

    def __post_init__(self) -> None:
        _positive("gamma_m", self.gamma_m)
        _positive("zeta_1", self.zeta_1)
        if not (np.isfinite(self.Q) and self.Q >= 0):
            raise UserError(f"Q = {self.Q:g}: a variance is a number >= 0")
        if not self.Q_m >= self.zeta_1**2:
            raise UserError(
                f"Q_m = {self.Q_m:g} is below zeta_1^2 = {self.zeta_1**2:g}: "
                f"Q_m = Q_V + zeta_2^2 and zeta_2 >= zeta_1 (Remark 1)"
            )
        # Rounding apart: estimates of both may meet.
        if not self.H_m <= self.gamma_m * (1 + 1e-9):
            raise UserError(f"H_m = {self.H_m:g} is larger than gamma_m = {self.gamma_m:g}")


def disagreement(X_ND: npt.ArrayLike, Pi: Matrix) -> float:
    """|X|^2_(I - Pi) = 1/2 sum_jl Pi[j,l] |x_l - x_j|^2, from the differences, in float64.

    As <X, (I - Pi) X> it would lose all digits where the agents are near each other.
    """
    X = np.asarray(X_ND, dtype=np.float64)
    total = 0.0
    for j, i in np.argwhere(Pi != 0):
        if j != i:
            difference = X[i] - X[j]
            total += float(Pi[j, i] * (difference @ difference))
    return total / 2


def lyapunov(losses_N: npt.ArrayLike, disagreement: float, alpha: float) -> float:
    """V(x, alpha) from the agents' f_j(x_j) and the disagreement. Source: eq. (9)."""
    return float(np.sum(losses_N)) + disagreement / (2 * alpha)


def lyapunov_gradient(G_ND: npt.ArrayLike, X_ND: npt.ArrayLike, Pi: Matrix, alpha: float) -> Floats:
    """grad V: the stacked gradients + (I - Pi) X / alpha, shape (N, D). Source: eq. (7)."""
    X = np.asarray(X_ND, dtype=np.float64)
    return np.asarray(G_ND, dtype=np.float64) + (X - Pi @ X) / alpha


def smoothness(gamma_m: float, lambda_n: float, alpha: float) -> float:
    """gamma_hat: V's gradient is Lipschitz with gamma_m + (1 - lambda_N)/alpha."""
    return gamma_m + (1 - lambda_n) / alpha


def strong_convexity(H_m: float, lambda_2: float, alpha: float) -> Versions[float]:
    """H_hat: how strongly convex V is. Corrected: erratum 1."""
    return Versions(printed=H_m + (1 - lambda_2) / (2 * alpha), corrected=H_m)


def largest_step(
    gamma_m: float,
    lambda_n: float,
    *,
    zeta_1: float = 1.0,
    Q_m: float = 1.0,
    condition: int = 15,
) -> float:
    """The largest alpha that (14) or (15) admits; none where this is not positive.

    (14): alpha <= 2 zeta_1/(gamma_hat Q_m), needed for V to fall. (15): half of that, which the
    paper's theorems ask for. gamma_hat has alpha in it, so with c = 2 or 1
    alpha <= (c zeta_1 - (1 - lambda_N) Q_m) / (gamma_m Q_m).

    Raises UserError for constants that are not positive.
    """
    assert condition in (14, 15)
    _positive("gamma_m", gamma_m)
    _positive("Q_m", Q_m)
    _positive("zeta_1", zeta_1)
    c = 2.0 if condition == 14 else 1.0
    return (c * zeta_1 - (1 - lambda_n) * Q_m) / (gamma_m * Q_m)


def slowest_mode(spectrum: Spectrum) -> float:
    """beta = max(|lambda_2|, |lambda_N|): by this a mixing step shrinks the agents' distance."""
    return 1.0 - spectrum.gap


def consensus_radius(alpha: float, L: float, spectrum: Spectrum) -> Versions[float]:
    """Within this of their mean do all agents stay, started from equal parameters.

    Bounds E |X - 1 s|, hence every E |x_j - s|. Corrected: erratum 3. At most a gradient along the
    slowest mode reaches it, see `fixed_point_radii`.

    Source: Proposition 1, (16).
    """
    return Versions(printed=alpha * L / (1 - spectrum.lambda_2), corrected=alpha * L / spectrum.gap)


def fixed_point_radii(alpha: float, spread: float, spectrum: Spectrum) -> tuple[float, float]:
    """Least and largest |X - 1 s| where exact gradients move nothing any more.

    There (I - Pi) X = -alpha grad f, whose part across the agents, of norm ``spread`` =
    |grad f - its mean over agents|, fixes X - 1 s. So Proposition 1 is at most
    (1 - lambda_N)/(1 - beta) * L/spread times the truth there. Derived here.
    """
    return alpha * spread / (1 - spectrum.lambda_n), alpha * spread / (1 - spectrum.lambda_2)


@dataclass(frozen=True)
class Descent:
    """What a step of size alpha does to V: E V(x_k+1) - V* <= rate (V(x_k) - V*) + noise.

    Attributes:
        admitted: the weakest condition that alpha meets: "(15)", "(14)" or "".
        rate: of the first printed line of (17), 1 - alpha H_hat zeta_1; corrected: with H_m, and
            where only (14) holds 1 - 2 alpha H_m (zeta_1 - gamma_hat alpha Q_m/2) from Lemma 2.
        second_line: the rate as the second printed line has it.
        noise: alpha^2 gamma_hat Q / 2.
        decrease: d in E V(x_k+1) - V(x_k) <= -d |grad V|^2 + noise; Theorem 2's is alpha zeta_1/2.
    """

    admitted: str
    rate: Versions[float]
    second_line: float
    noise: float
    decrease: float


def descent(alpha: float, constants: Constants, spectrum: Spectrum) -> Descent:
    """One step of size ``alpha`` by Lemma 2, (13), and by Theorem 1. Undirected graphs only.

    Raises UserError for a step size that is not positive.
    """
    _positive("alpha", alpha)
    zeta_1, Q_m = constants.zeta_1, constants.Q_m
    gamma_hat = smoothness(constants.gamma_m, spectrum.lambda_n, alpha)
    H_hat = strong_convexity(constants.H_m, spectrum.lambda_2, alpha)
    exact = alpha * (zeta_1 - gamma_hat * alpha * Q_m / 2)
    slack = 1 + 1e-12  # a step at the limit is within it
    if alpha * gamma_hat * Q_m <= zeta_1 * slack:
        admitted, decrease = "(15)", alpha * zeta_1 / 2
    elif alpha * gamma_hat * Q_m <= 2 * zeta_1 * slack:
        admitted, decrease = "(14)", exact
    else:
        admitted, decrease = "", float("nan")
    return Descent(
        admitted=admitted,
        rate=Versions(
            printed=1 - alpha * H_hat.printed * zeta_1,
            corrected=1 - 2 * decrease * H_hat.corrected,
        ),
        second_line=1 - (alpha * constants.H_m + 1 - spectrum.lambda_2) * zeta_1,
        noise=alpha**2 * gamma_hat * constants.Q / 2,
        decrease=decrease,
    )


def _positive(name: str, value: float) -> None:
    if not (np.isfinite(value) and value > 0):
        raise UserError(f"{name} = {value:g}: it must be a number > 0")

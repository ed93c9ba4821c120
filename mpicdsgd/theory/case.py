"""A run that the theory may speak of, with all that its bounds are made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpicdsgd.algorithms.config import descends, rounds_of
from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs.mixing_cycle import covered
from mpicdsgd.graphs.mixing_matrix import Spectrum, powered
from mpicdsgd.theory import bounds, formulas
from mpicdsgd.theory.estimates import Estimate
from mpicdsgd.theory.gradient_noise import has_batch_statistics
from mpicdsgd.theory.measured_constants import Effort, Found, find, gradient_bound
from mpicdsgd.theory.objective import Floats
from mpicdsgd.theory.rebuilt_checkpoints import Saved
from mpicdsgd.theory.rebuilt_run import Rebuilt
from mpicdsgd.theory.verdicts import Verdict

# Losses and parameters are float32 in a run: up to so much of a sum of them it says nothing.
FLOAT32 = 2.0**-18
# Up to which a minimum is looked for: samples times parameters; agents times parameters.
_WORK, _SIZE = 5e8, 1e6
UNKNOWN_STEPS = "the step sizes are not known: run with run.theory = true"

Series = dict[str, list[float]]


@dataclass(frozen=True)
class Case:
    """See the module.

    Attributes:
        found: None where the constants cannot be had.
        L: of Proposition 1; None where it cannot be had.
        why: why the theorems do not apply; "" where they do.
        why_not_1: of Proposition 1, which asks for less.
        spectrum: of Pi, or of its power where there are several mixing rounds in a step.
        first: the step where the trace, or the run, begins.
        alphas: of the steps from ``first`` on, or None where nobody knows.
        series: for the plot and for JSON; the bounds fill it.
    """

    run: Rebuilt
    found: Found | None
    L: Estimate | None
    why: str
    why_not_1: str
    spectrum: Spectrum
    rounds: int
    first: int
    alphas: Floats | None
    series: dict[str, Series]

    @property
    def fixed(self) -> bool:
        """Whether all steps are of one size."""
        return self.alphas is not None and bool((self.alphas == self.alphas[0]).all())

    @property
    def length(self) -> int:
        """How many steps are known."""
        return 0 if self.alphas is None else len(self.alphas)

    @property
    def step_matrix(self) -> Floats:
        """Pi of a whole step, shape (N, N)."""
        power = np.linalg.matrix_power(self.run.mixing.turns[0].Pi, self.rounds)
        return np.asarray(power, dtype=np.float64)

    @property
    def saved(self) -> list[Saved]:
        """Checkpoints after known steps, oldest first."""
        return [one for one in self.run.saved[::-1] if 0 < one.step <= self.length]

    @property
    def scale(self) -> float:
        """|X|, the largest known."""
        known = [self.run.start, *(one.X_ND for one in self.run.saved[:1])]
        return max(float(np.linalg.norm(X)) for X in known)

    @property
    def initial_distance(self) -> float | None:
        """|X - 1 s| at step ``first``; None where it is not known."""
        if self.first == 0:
            X = self.run.start
            return float(np.linalg.norm(X - X.mean(axis=0)))
        for step, distance in self.distances:
            if step == self.first:
                return distance
        return None

    @property
    def distances(self) -> list[tuple[int, float]]:
        """Step and |X - 1 s| of every evaluation among the known steps."""
        root_n = float(np.sqrt(self.run.agents))
        return [
            (line["step"], float(line["consensus"]["rms"]) * root_n)
            for line in self.run.lines
            if isinstance(line.get("consensus"), dict)
            and self.first <= line["step"] <= self.first + self.length
        ]

    @property
    def penalty(self) -> Floats:
        """The trace's, NaN where an older version wrote it and there is one."""
        assert self.run.trace is not None
        penalty = self.run.trace.penalty
        return penalty if self.run.config.optim.weight_decay else np.zeros_like(penalty)

    def apart(self) -> Floats:
        """The bound c_k on |X_k - 1 s_k|, for `bounds`."""
        assert self.L is not None
        assert self.alphas is not None
        initial = self.initial_distance
        assert initial is not None
        return bounds.consensus_bound(self.alphas, self.L.value, self.spectrum, initial)

    def v_at_start(self, alpha: float) -> float:
        """V(x_0, alpha) of the whole shares, in float64."""
        X = self.run.start
        values = [o.value(x) for o, x in zip(self.run.objectives, X, strict=True)]
        return formulas.lyapunov(values, formulas.disagreement(X, self.step_matrix), alpha)

    def too_large(self) -> str:
        """Why no minimum is looked for; "" where one is."""
        samples, size = sum(len(o.samples) for o in self.run.objectives), self.run.start.shape[1]
        if self.run.agents * size > _SIZE:
            return (
                f"{self.run.agents} agents with {size} parameters are too many for a search of the "
                f"minimum (at most {_SIZE:.0e} together)"
            )
        if samples * size <= _WORK:
            return ""
        return (
            f"{samples} samples times {size} parameters are too much for a search of the minimum "
            f"(at most {_WORK:.0e})"
        )


def case_of(run: Rebuilt, effort: Effort) -> Case:
    """What the theory can be asked of ``run``. Local; estimates the constants."""
    optim, mixing = run.config.optim, run.mixing
    why = ""
    if not descends(optim):
        kind = "momentum" if optim.name == "cdmsgd" else "an update of its own"
        why = f"the theory is of CDSGD, and {optim.name} has {kind}"
    elif len(mixing.turns) > 1:
        why = f"{len(mixing.turns)} matrices are used in turn, and the theory has one"
    elif not covered(mixing):
        why = "the graph is directed, and the theory asks for a symmetric matrix"
    elif run.config.exchange.wire != "float32":
        why = f"exchange.wire = {run.config.exchange.wire} rounds what is mixed"
    why_not_1 = why
    if optim.clip_norm > 0:
        why = why or "optim.clip_norm changes the gradients"
    found = None
    if has_batch_statistics(run.model):
        why = why or "with BatchNorm a sample's loss depends on its minibatch, and f_j is no mean"
    else:
        found = find(run, effort)
        try:
            _ = found.constants
        except UserError as error:
            why = why or str(error)
    rounds = rounds_of(optim)
    return Case(
        run,
        found,
        gradient_bound(run, None if found is None else found.noise),
        why,
        why_not_1,
        powered(mixing.spectrum, rounds) if covered(mixing) else mixing.spectrum,
        rounds,
        int(run.trace.step[0]) if run.trace is not None else 0,
        _alphas(run),
        series={},
    )


def _alphas(run: Rebuilt) -> Floats | None:
    if run.trace is not None:
        return run.trace.lr
    last = max([line["step"] for line in run.lines] + [one.step for one in run.saved])
    if run.config.optim.schedule.strip() != "fixed" or not last:
        return None
    return np.full(last, run.config.optim.lr)


ONE_RUN = "one run, where the bound is on the mean over runs"


Verdicts = list[Verdict]


def uncertain(found: Found) -> str:
    return "" if found.gamma_m.certain else "as far as gamma_m is known"


def assuming(*details: str) -> str:
    return "; ".join(detail for detail in details if detail)

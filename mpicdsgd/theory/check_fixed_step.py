"""Every bound of the theory beside a run: printed and corrected, and what is to be said of them.

Each function takes a case and returns a verdict for each version of its bound.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from mpicdsgd.graphs.mixing_matrix import EXACT
from mpicdsgd.theory import bounds, formulas, minimise
from mpicdsgd.theory.case import (
    FLOAT32,
    ONE_RUN,
    UNKNOWN_STEPS,
    Case,
    Verdicts,
    assuming,
    uncertain,
)
from mpicdsgd.theory.estimates import Kind
from mpicdsgd.theory.measured_constants import Found
from mpicdsgd.theory.objective import Floats
from mpicdsgd.theory.verdicts import (
    CORRECTED,
    PRINTED,
    Verdict,
    compare,
    not_applicable,
    window_means,
)

_CLOSE = 1e-3  # of V(x_0) - V*: the search for V* must end within
_NEEDS = ((PRINTED, ("(15)",)), (CORRECTED, ("(15)", "(14)")))


def conditions(case: Case) -> Verdicts:
    """(14) and (15): whether the step sizes are admitted."""
    made: Verdicts = []
    for number in (14, 15):
        name = f"condition ({number})"
        if case.why or case.found is None or case.alphas is None:
            made.append(not_applicable(name, "", case.why or UNKNOWN_STEPS))
            continue
        c = case.found.constants
        largest = formulas.largest_step(
            c.gamma_m, case.spectrum.lambda_n, zeta_1=c.zeta_1, Q_m=c.Q_m, condition=number
        )
        if largest * c.gamma_m <= EXACT:  # what rounding leaves of a lambda_N that is 0
            largest = 0.0
        detail = "" if largest > 0 else "no step size is admitted by this matrix"
        steps = case.first + np.arange(len(case.alphas))
        verdict = compare(
            name, "", steps, case.alphas, np.full(len(steps), largest),
            resolution=1e-9 * largest, detail=assuming(detail, uncertain(case.found)),
        )  # fmt: skip
        if verdict.violations and case.found.gamma_m.kind == Kind.BOUND:
            more = "gamma_m is a bound from above, so larger steps may be admitted"
            verdict = replace(verdict, detail=assuming(verdict.detail, more))
        made.append(verdict)
    return made


def proposition_1(case: Case) -> Verdicts:
    """The agents' distance |X - 1 s| at the evaluations."""
    name, why = "Proposition 1", case.why_not_1
    L, alphas, initial = case.L, case.alphas, case.initial_distance
    if not why and alphas is None:
        why = UNKNOWN_STEPS
    if not why and L is None:
        why = "no bound of the gradients is known: run with run.theory = true"
    if not why and initial is None:
        why = f"the agents' distance at step {case.first}, where the trace begins, is not known"
    if not why and not case.distances:
        why = "there is no evaluation within the known steps yet"
    if why:
        return _neither(name, why)
    assert L is not None
    assert alphas is not None
    assert initial is not None
    steps = np.array([k for k, _ in case.distances])
    measured = np.array([distance for _, distance in case.distances])
    radius = formulas.consensus_radius(float(alphas.max()), L.value, case.spectrum)
    printed = np.full(len(steps), radius.printed)
    corrected = np.full(len(steps), radius.corrected)
    details = ["" if L.certain else f"L is {L.how}"]
    if initial > 0 or not case.fixed:
        corrected = case.apart()[steps - case.first]
        details.append("with a term for the unequal start" if initial > 0 else "")
    case.series["consensus"] = {
        "step": steps.tolist(), "measured": measured.tolist(), "corrected": corrected.tolist(),
        "printed": printed.tolist() if case.fixed else [],
    }  # fmt: skip
    made = []
    for version, limit in ((PRINTED, printed), (CORRECTED, corrected)):
        if version == PRINTED and not case.fixed:
            made.append(not_applicable(name, version, "the steps are of different sizes"))
            continue
        detail = details[0] if version == PRINTED else assuming(*details)
        rest = FLOAT32 * case.scale
        made.append(compare(name, version, steps, measured, limit, resolution=rest, detail=detail))
    return made


def theorem_1(case: Case) -> Verdicts:
    """V(x_k) - V*, for strongly convex objectives."""
    name = "Theorem 1"
    found, trace = case.found, case.run.trace
    if why := _why_not_fixed(case):
        return _neither(name, why)
    assert found is not None
    assert case.alphas is not None
    if trace is None:
        return _neither(name, case.run.no_trace)
    if why := _why_no_excess(case, found):
        return _neither(name, why)
    alpha, objectives = float(case.alphas[0]), case.run.objectives
    descent = formulas.descent(alpha, found.constants, case.spectrum)
    if not descent.admitted:
        return [_not_admitted(name, version, alpha, needs) for version, needs in _NEEDS]
    start = case.run.saved[0].X_ND if case.run.saved else case.run.start
    least = minimise.minimise(
        minimise.of_v(objectives, case.step_matrix, alpha), start, found.H_m.value
    )
    parts = trace.loss + case.penalty + trace.disagreement / (2 * alpha)
    excess = parts - least.value
    begin = case.v_at_start(alpha) - least.value if case.first == 0 else float(excess[0])
    if not least.slack <= _CLOSE * begin:
        return _neither(name, f"V* is not known: the search ended within {least.slack:.1g} of it")
    limit = bounds.theorem_1(np.arange(len(parts)), begin, descent)
    steps = trace.step
    resolution = FLOAT32 * np.abs(parts) + least.slack
    printed, corrected = limit.printed, limit.corrected
    details = [uncertain(found)]
    later = slice(1 if len(steps) > 1 else 0, None)  # where it begins, both are the same
    if not found.exact_gradients:
        later = slice(None)
        window = len(case.run.batches)
        steps, (excess, printed, corrected, resolution) = window_means(
            steps, window, excess, printed, corrected, resolution
        )
        details += [ONE_RUN, f"V is the mean over {window} steps, of the minibatches' losses"]
    case.series["V"] = {
        "step": steps.tolist(), "measured": excess.tolist(), "printed": printed.tolist(),
        "corrected": corrected.tolist(),
    }  # fmt: skip
    return _as_admitted(
        name, descent.admitted, alpha, steps[later], excess[later],
        (printed[later], corrected[later]), resolution[later], assuming(*details),
    )  # fmt: skip


def _why_no_excess(case: Case, found: Found) -> str:
    """Why V(x_k) - V* is not known to fall, or cannot be measured; "" where it can."""
    if not found.H_m.value > 0:
        why = "H_m = 0: the objectives are not known to be strongly convex"
        return why if found.lowest is not None else f"{why}; with optim.weight_decay they are"
    if case.rounds > 1:
        return "the trace's disagreement is of Pi, the theorem's of its power"
    if np.isnan(case.penalty).any():
        return "the trace has no penalty of the weight decay: an older version made it"
    return case.too_large()


def theorem_2(case: Case) -> Verdicts:
    """sum |grad V(x_k)|^2 over the steps so far, without convexity."""
    name = "Theorem 2"
    found, trace = case.found, case.run.trace
    if why := _why_not_fixed(case):
        return _neither(name, why)
    assert found is not None
    assert case.alphas is not None
    if trace is None:
        return _neither(name, case.run.no_trace)
    if np.isnan(trace.moved).any():
        return _neither(
            name, "the trace does not say how far the steps moved: an older version made it"
        )
    if trace.loss.min() < 0:
        return _neither(name, "the loss is below 0 somewhere, so no lower bound of V is known")
    alpha = float(case.alphas[0])
    if case.first == 0:
        drop = case.v_at_start(alpha)
    elif case.rounds > 1 or np.isnan(case.penalty).any():
        return _neither(name, f"V is not known at step {case.first}, where the trace begins")
    else:
        drop = float(trace.loss[0] + case.penalty[0] + trace.disagreement[0] / (2 * alpha))
    descent = formulas.descent(alpha, found.constants, case.spectrum)
    limit = bounds.theorem_2(np.arange(1, len(trace.moved) + 1), drop, descent)
    squares = trace.moved / alpha**2
    details = [uncertain(found)]
    if not found.exact_gradients:
        per_agent = trace.batch / case.run.agents
        known = {b: found.noise.variance(b) for b in np.unique(per_agent).tolist()}
        variance = np.array([known[b][0] for b in per_agent.tolist()])
        error = sum(known[b][1] for b in per_agent.tolist())
        raw = np.cumsum(squares)
        squares = squares - variance
        details += [
            ONE_RUN,
            f"the minibatches' variance, {variance.mean():.3g} a step, is taken off"
            + (
                ", and needs not be"
                if (raw <= limit).all()
                else f" ({error:.2g} of the sum uncertain)"
            ),
        ]
    sums = np.cumsum(squares)
    case.series["gradient"] = {
        "step": trace.step.tolist(), "measured": (sums / np.arange(1, len(sums) + 1)).tolist(),
        "corrected": (limit / np.arange(1, len(sums) + 1)).tolist(),
    }  # fmt: skip
    return _as_admitted(
        name, descent.admitted, alpha, trace.step, sums, (limit, limit),
        FLOAT32 * np.abs(limit), assuming(*details),
    )  # fmt: skip


def _not_admitted(name: str, version: str, alpha: float, needs: tuple[str, ...]) -> Verdict:
    return not_applicable(name, version, f"alpha = {alpha:g} does not meet {needs[-1]}")


def _as_admitted(
    name: str,
    admitted: str,
    alpha: float,
    steps: npt.NDArray[np.int64],
    measured: Floats,
    limits: tuple[Floats, Floats],
    resolution: Floats,
    detail: str,
) -> Verdicts:
    """Printed and corrected bound, each where ``alpha`` meets a condition that it needs."""
    made = []
    for (version, needs), limit in zip(_NEEDS, limits, strict=True):
        if admitted in needs:
            made.append(
                compare(name, version, steps, measured, limit, resolution=resolution, detail=detail)
            )
        else:
            made.append(_not_admitted(name, version, alpha, needs))
    return made


def _neither(name: str, why: str) -> Verdicts:
    return [not_applicable(name, version, why) for version in (PRINTED, CORRECTED)]


def _why_not_fixed(case: Case) -> str:
    if case.why:
        return case.why
    if case.alphas is None:
        return UNKNOWN_STEPS
    return "" if case.fixed else "the steps are of different sizes"

"""Runs with a step size that falls, beside the bounds for them."""

from __future__ import annotations

import numpy as np

from mpicdsgd.common.errors import UserError
from mpicdsgd.theory import bounds, minimise
from mpicdsgd.theory.case import (
    FLOAT32,
    ONE_RUN,
    UNKNOWN_STEPS,
    Case,
    Verdicts,
    assuming,
    uncertain,
)
from mpicdsgd.theory.verdicts import (
    compare,
    not_applicable,
)


def distance(case: Case) -> Verdicts:
    """|s - x*| of the agents' mean at the checkpoints, for steps of any sizes."""
    name = "distance of the mean to the optimum"
    why = _why_no_mean(case) or (
        "" if case.found is None or case.found.H_m.value > 0 else "H_m = 0: not strongly convex"
    ) or case.too_large()  # fmt: skip
    if why:
        return [not_applicable(name, "", why)]
    found, alphas = case.found, case.alphas
    assert found is not None
    assert alphas is not None
    saved = case.saved
    H = found.H_m.value
    means = [one.X_ND.mean(axis=0) for one in saved]
    least = minimise.minimise(minimise.of_mean(case.run.objectives), means[-1], H)
    begin = float(np.linalg.norm(case.run.start.mean(axis=0) - least.x))
    try:
        limit = bounds.distance_bound(alphas, case.apart(), found.constants, case.run.agents, begin)
    except UserError as error:
        return [not_applicable(name, "", str(error))]
    steps = np.array([one.step for one in saved])
    measured = np.array([float(np.linalg.norm(s - least.x)) for s in means])
    rest = np.sqrt(2 * least.slack / H) + FLOAT32 * case.scale
    details = [uncertain(found), "" if found.exact_gradients else ONE_RUN]
    return [
        compare(name, "", steps, measured, limit[steps], resolution=rest, detail=assuming(*details))
    ]


def gradient(case: Case) -> Verdicts:
    """|grad f(s)|^2 of the agents' mean, against the least that the steps so far must have had."""
    name = "gradient at the mean"
    if why := _why_no_mean(case):
        return [not_applicable(name, "", why)]
    found, alphas = case.found, case.alphas
    assert found is not None
    assert alphas is not None
    function = minimise.of_mean(case.run.objectives)
    begin, _ = function(case.run.start.mean(axis=0))
    trace = case.run.trace
    if begin < 0 or (trace is not None and trace.loss.min() < 0):
        return [not_applicable(name, "", "the loss is below 0 somewhere, so inf f is not known")]
    try:
        limit = bounds.gradient_bound(alphas, case.apart(), found.constants, case.run.agents, begin)
    except UserError as error:
        return [not_applicable(name, "", str(error))]
    limit = limit / np.cumsum(alphas)
    saved = case.saved
    steps = np.array([one.step for one in saved])
    gradients = [function(one.X_ND.mean(axis=0))[1] for one in saved]
    measured = np.array([float(g @ g) for g in gradients])
    details = [uncertain(found), "" if found.exact_gradients else ONE_RUN]
    made = compare(name, "", steps, measured, limit[steps - 1], detail=assuming(*details))
    if made.violations:
        why = "it is larger at a checkpoint, but the bound is on the least of all steps"
        return [not_applicable(name, "", why)]
    return [made]


def _why_no_mean(case: Case) -> str:
    """Why the bounds on the agents' mean do not apply."""
    if case.why:
        return case.why
    if case.alphas is None:
        return UNKNOWN_STEPS
    if case.first:
        return f"the trace begins at step {case.first}"
    if case.found is not None and not case.found.noise.zeta_1.certain:
        return "with dropout the mean gradient is not the objective's"
    return "" if case.saved else "there is no checkpoint within the trace"

"""A run beside every bound of the theory, as printed and as corrected: `mpicdsgd theory`.

`report` has all figures, ready for JSON; `table.py` has them as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpicdsgd.common.strict_json import strict
from mpicdsgd.theory import check_diminishing, check_fixed_step
from mpicdsgd.theory.case import case_of
from mpicdsgd.theory.measured_constants import Effort, Found
from mpicdsgd.theory.rebuilt_run import rebuild
from mpicdsgd.theory.verdicts import Verdict

_BOUNDS = (
    check_fixed_step.conditions,
    check_fixed_step.proposition_1,
    check_fixed_step.theorem_1,
    check_fixed_step.theorem_2,
    check_diminishing.distance,
    check_diminishing.gradient,
)


def report(
    run_dir: Path, overrides: Sequence[str] = (), effort: Effort | None = None
) -> dict[str, Any]:
    """Everything that can be said of the run in ``run_dir``, as JSON. Local, no ranks.

    Raises:
        UserError: see `theory.rebuilt_run.rebuild`.
    """
    run = rebuild(run_dir, overrides)
    case = case_of(run, effort or Effort())
    verdicts: list[Verdict] = [verdict for bound in _BOUNDS for verdict in bound(case)]
    last = run.lines[-1] if run.lines else {}
    known = f"steps {case.first} to {case.first + case.length - 1}"
    made: dict[str, Any] = strict(
        {
            "run": str(run_dir),
            "generation": run.generation,
            "agents": run.agents,
            "parameters": run.start.shape[1],
            "optim": run.config.optim.name,
            "mixing": run.mixing.name,
            "spectrum": {
                "lambda_2": case.spectrum.lambda_2,
                "lambda_n": case.spectrum.lambda_n,
                "gap": case.spectrum.gap,
                "rounds": case.rounds,
            },
            "step": last.get("step"),
            "alpha": None if case.alphas is None else [case.alphas[0], case.alphas[-1]],
            "trace": run.no_trace or known,
            "constants": None if case.found is None else _constants(case.found),
            "L": None if case.L is None else case.L.as_json(),
            "consensus": last.get("consensus"),
            "verdicts": [{**asdict(v), "text": v.text, "factor": v.factor} for v in verdicts],
            "series": case.series,
        }
    )
    return made


def _constants(found: Found) -> dict[str, Any]:
    noise = found.noise
    named = {
        "gamma_m": found.gamma_m,
        "H_m": found.H_m,
        "Q": noise.Q,
        "zeta_1": noise.zeta_1,
        "zeta_2": noise.zeta_2,
    }
    return {
        **{name: estimate.as_json() for name, estimate in named.items()},
        "Q_V": 0.0,
        "places": found.places,
        "agents": [
            {"kind": c.kind, "gamma": c.gamma.as_json(), "H": c.H.as_json(), "lowest": c.lowest}
            for c in found.curvatures
        ],
    }

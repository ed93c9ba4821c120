"""What a topology and its mixing matrix are worth, in figures; `graph_table.py` has them as text.

How far a gap goes is told in steps, what it costs in messages and bytes; `theory.formulas` tells
which step sizes the matrix admits and how near to each other the agents then stay. No MPI here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs.graph import Graph
from mpicdsgd.graphs.mixing_cycle import Mixing, covered
from mpicdsgd.graphs.mixing_matrix import EXACT
from mpicdsgd.graphs.specs import graph_from_spec, mixing_from_spec
from mpicdsgd.theory import formulas

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Report = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What a report says beyond the graph and its spectrum; None: not that.

    Attributes:
        parameters: D, of one model; for the bytes.
        wire: what travels, a key of `ITEM_BYTES`.
        gamma_m, Q_m, zeta_1: as in `theory.formulas.Constants`; for the largest step sizes.
        lr, gradient_bound: alpha and L; for Proposition 1's radius.

    Raises UserError for values that cannot be, and for half a question.
    """

    parameters: int | None = None
    wire: str = "float32"
    gamma_m: float | None = None
    Q_m: float | None = None
    zeta_1: float | None = None
    lr: float | None = None
    gradient_bound: float | None = None

    def __post_init__(self) -> None:
        assert self.wire in ITEM_BYTES
        if self.parameters is not None and self.parameters < 1:
            raise UserError(f"--parameters {self.parameters}: a model has at least one")
        if self.gamma_m is not None:
            formulas.Constants(self.gamma_m, Q_m=self.noise_factor, zeta_1=self.alignment)
        elif self.Q_m is not None or self.zeta_1 is not None:
            raise UserError("--Q-m and --zeta-1 belong to step sizes: give --gamma too")
        if (self.lr is None) != (self.gradient_bound is None):
            raise UserError(
                "the consensus radius needs the step size and a bound on the gradients: give both "
                "--lr and --gradient-bound"
            )
        for name, value in (("--lr", self.lr), ("--gradient-bound", self.gradient_bound)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} {value:g}: it must be a number > 0")

    @property
    def noise_factor(self) -> float:
        """Q_m; 1 where it is not given."""
        return 1.0 if self.Q_m is None else self.Q_m

    @property
    def alignment(self) -> float:
        """zeta_1; 1 where it is not given."""
        return 1.0 if self.zeta_1 is None else self.zeta_1


def graph_of(spec: str, n: int | None, mixing_spec: str | None) -> tuple[Graph, Mixing]:
    """The graph of ``spec`` and its mixing; None: by the spec's sizes, by `usual_mixing`.

    Raises UserError as `specs.py` does, and where nothing says how many agents there are.
    """
    graph = graph_from_spec(spec, agents_in(spec) if n is None else n)
    return graph, mixing_from_spec(mixing_spec or usual_mixing(graph), graph)


def usual_mixing(graph: Graph) -> str:
    """The mixing that fits without being asked for."""
    return "uniform" if graph.directed else "metropolis"


def agents_in(spec: str) -> int:
    """How many agents a torus or grid with its sizes has. Raises UserError for other specs."""
    sizes = re.fullmatch(r"(?:torus|grid):(\d{1,6})x(\d{1,6})", spec)
    if sizes is None:
        raise UserError(f"how many agents has {spec}? Say it with -n, as in -n 5")
    return int(sizes[1]) * int(sizes[2])


def report(spec: str, graph: Graph, mixing: Mixing, question: Question) -> Report:
    """All figures of one graph and its mixing, ready for JSON; None: there is no such number."""
    spectrum = mixing.spectrum
    messages_N = sent_by_agent(mixing)
    messages = float(messages_N.mean())
    size = None if question.parameters is None else question.parameters * ITEM_BYTES[question.wire]
    return {
        "spec": spec,
        "agents": graph.n,
        "directed": graph.directed,
        "edges": len(graph.edges) if graph.directed else len(graph.edges) // 2,
        "degree_min": min(graph.degrees),
        "degree_max": max(graph.degrees),
        "diameter": graph.diameter,
        "mixing": mixing.name,
        "lambda_2": spectrum.lambda_2,
        "lambda_n": spectrum.lambda_n,
        "gap": spectrum.gap,
        "turns": len(mixing.turns),
        "gap_per_turn": mixing.gap_per_turn,
        "steps_to_mix": steps_to_mix(mixing),
        "messages_per_step": messages,
        "messages_max": float(messages_N.max()),
        "bytes_per_step": None if size is None else size * messages,
        "gap_per_message": mixing.gap_per_turn / messages if messages else None,
        **_by_theory(mixing, question),
        "assumption_2": [
            {"condition": c.name, "holds": c.holds, "detail": c.detail} for c in mixing.conditions
        ],
        "remarks": [*graph.remarks, *mixing.remarks],
    }


def steps_to_mix(mixing: Mixing) -> float | None:
    """In how many steps mixing alone brings the disagreement down to 1/10, by the slowest mode.

    At least 1; what averages exactly does so at the end of its cycle. None: never, for float64.
    """
    gap = mixing.gap_per_turn
    if gap >= 1 - EXACT:
        return float(len(mixing.turns))
    return max(1.0, math.log(10) / -math.log1p(-gap)) if gap > 0 else None


def sent_by_agent(mixing: Mixing) -> formulas.Floats:
    """Messages that each agent sends in a step, of a cycle the mean over its turns, shape (N,)."""
    sent = [[len(readers) for readers in turn.graph.destinations] for turn in mixing.turns]
    return np.asarray(np.mean(sent, axis=0), dtype=np.float64)


def _by_theory(mixing: Mixing, question: Question) -> Report:
    figures: Report = {"covered": covered(mixing)}
    spectrum = mixing.spectrum
    if question.gamma_m is not None:
        for kind, lambda_n in (("", spectrum.lambda_n), ("lazy_", (1 + spectrum.lambda_n) / 2)):
            for condition in (14, 15):
                largest = formulas.largest_step(
                    question.gamma_m,
                    lambda_n,
                    zeta_1=question.alignment,
                    Q_m=question.noise_factor,
                    condition=condition,
                )
                # Of a lambda_N that is 0 rounding can leave a step of 1e-17.
                positive = figures["covered"] and largest * question.gamma_m > EXACT
                figures[f"{kind}largest_step_{condition}"] = largest if positive else None
    if question.lr is not None and question.gradient_bound is not None:
        radius = None
        if figures["covered"]:
            radius = formulas.consensus_radius(question.lr, question.gradient_bound, spectrum)
        figures["consensus_radius_printed"] = None if radius is None else radius.printed
        figures["consensus_radius_corrected"] = None if radius is None else radius.corrected
    return figures

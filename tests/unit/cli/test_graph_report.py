"""The figures of a report against formulas of their own, and what is no question."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mpicdsgd.cli import graph_suggest, graph_table
from mpicdsgd.cli.graph_report import Question, Report, graph_of, report
from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs.graph import Graph
from mpicdsgd.graphs.mixing_rules import metropolis


def reported(spec: str, n: int, mixing: str | None = None, **asked: Any) -> Report:
    return report(spec, *graph_of(spec, n, mixing), Question(**asked))


def test_time_and_bytes() -> None:
    ring = reported("ring", 8, parameters=1000, wire="bfloat16")
    lambda_2 = (1 + 2 * math.cos(math.pi / 4)) / 3
    assert lambda_2 ** ring["steps_to_mix"] == pytest.approx(0.1)
    assert (ring["messages_per_step"], ring["bytes_per_step"]) == (2, 4000)
    assert ring["gap_per_message"] == pytest.approx((1 - lambda_2) / 2)
    star = reported("star", 5)
    assert (star["messages_per_step"], star["messages_max"]) == (1.6, 4)
    assert star["bytes_per_step"] is None
    cycle = reported("expo", 8, "one-peer", parameters=10)
    assert (cycle["messages_per_step"], cycle["bytes_per_step"]) == (1, 40)
    assert cycle["steps_to_mix"] == 3, "equal after all turns, not before"
    alone = reported("complete", 1)
    assert (alone["messages_per_step"], alone["gap_per_message"]) == (0, None)
    assert "gap per message -" in graph_table.details(alone)


def test_largest_steps() -> None:
    # A ring of 8 by Metropolis: lambda_N = -1/3.
    ring = reported("ring", 8, gamma_m=2.0, Q_m=1.1, zeta_1=0.9)
    for kind, lambda_n in (("", -1 / 3), ("lazy_", 1 / 3)):
        for condition, c in ((14, 2), (15, 1)):
            expected = (c * 0.9 - (1 - lambda_n) * 1.1) / (2 * 1.1)
            found = ring[f"{kind}largest_step_{condition}"]
            assert found == (pytest.approx(expected) if expected > 0 else None)
    text = graph_table.details(reported("ring", 8, gamma_m=2.0))
    assert "by (14) 0.3333, by (15) none; the lazy matrix (I + Pi)/2 admits" in text
    assert reported("complete", 7, gamma_m=1.0)["largest_step_15"] is None, "0, but for rounding"


def test_consensus_radius() -> None:
    one = reported("complete", 2, "lazy:uniform", lr=0.1, gradient_bound=3.0)
    assert one["consensus_radius_corrected"] == pytest.approx(0.1 * 3 / 0.5)
    # K_3,3 by Metropolis: 1/4 on each edge, so eigenvalues 1, 1/4 and -1/2.
    graph = Graph.from_edges(6, [(a, b) for a in range(3) for b in range(3, 6)])
    one = report("k33", graph, metropolis(graph), Question(lr=0.1, gradient_bound=3.0))
    assert one["consensus_radius_printed"] == pytest.approx(0.3 / 0.75)
    assert one["consensus_radius_corrected"] == pytest.approx(0.3 / 0.5)
    assert "0.4 as printed, 0.6 corrected" in graph_table.details(one)


def test_not_covered() -> None:
    for spec, mixing in (("expo", None), ("expo", "one-peer"), ("ring", "matchings")):
        one = reported(spec, 8, mixing, gamma_m=1.0, lr=0.1, gradient_bound=1.0)
        assert one["largest_step_14"] is None
        assert one["consensus_radius_corrected"] is None
        assert graph_table.details(one).count(graph_table.NOT_COVERED) == 2
        assert graph_table.table([one, one]).endswith(f"* {graph_table.NOT_COVERED}")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"parameters": 0}, "at least one"),
        ({"gamma_m": -1.0}, "gamma_m = -1"),
        ({"gamma_m": 1.0, "Q_m": 0.5}, "Q_m"),
        ({"Q_m": 2.0}, "give --gamma too"),
        ({"lr": 0.1}, "--gradient-bound"),
        ({"lr": math.nan, "gradient_bound": 1.0}, "--lr nan"),
    ],
)
def test_no_question(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Question(**asked)


def test_suggestions_keep_the_bound() -> None:
    found = graph_suggest.suggest(16, 3)
    specs = {spec for spec, _, _ in found}
    assert {"ring", "chain"} < specs
    assert not specs & {"torus", "hypercube", "expo", "complete", "star"}
    assert all(max(graph.degrees) <= 3 for _, graph, _ in found)
    best = graph_suggest.suggest(16, 4)[0]
    assert best[2].gap_per_turn == pytest.approx(1), "a hypercube's matchings, or one-peer"

"""Which topology to take: known families and random regular graphs, by gap per message.

All messages are equally long, so that is by gap per byte too. Mixing is ``metropolis``, on the
directed exponential graph ``uniform``; cycles (one-peer, matchings) count by their mean turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mpicdsgd.cli.graph_report import Report, sent_by_agent, usual_mixing
from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs.graph import Graph
from mpicdsgd.graphs.mixing_cycle import Mixing
from mpicdsgd.graphs.specs import graph_from_spec, mixing_from_spec

MAX_AGENTS = 1024  # eigenvalues in O(N^3), of some fifty matrices
SEEDS = 3
# Each regular degree up to here, then doubled: more neighbours bring ever less per message.
_EVERY_DEGREE = 16
_MAX_MATCHED = 1024  # edges: colouring them takes seconds above

_FAMILIES = (
    ("ring", ("metropolis", "matchings")),
    ("chain", ("metropolis", "matchings")),
    ("star", ("metropolis",)),
    ("torus", ("metropolis", "matchings")),
    ("grid", ("metropolis", "matchings")),
    ("hypercube", ("metropolis", "matchings")),
    ("complete", ("metropolis",)),
    ("expo", ("uniform", "one-peer")),
)


def suggest(n: int | None, max_degree: int | None = None) -> list[tuple[str, Graph, Mixing]]:
    """Candidates (spec, graph, mixing) for ``n`` agents, best first; of random ones the best seed.

    Args:
        n: number of agents, 2 to `MAX_AGENTS`.
        max_degree: neighbours that an agent may ever have; None: any number.

    Raises:
        UserError: n is missing or out of range, or no connected graph has so low a degree.
    """
    if n is None:
        raise UserError("--suggest for how many agents? Say it with -n, as in -n 64")
    if not 2 <= n <= MAX_AGENTS:
        raise UserError(f"--suggest takes 2 to {MAX_AGENTS} agents, got {n}")
    limit = n - 1 if max_degree is None else max_degree
    if limit < 1:
        raise UserError(f"--max-degree {limit}: an agent needs at least one neighbour")
    found: dict[str, tuple[str, Graph, Mixing]] = {}
    for spec, graph, mixings in (*_known(n, limit), *_regular(n, limit)):
        for name in mixings:
            if name != "matchings" or len(graph.edges) // 2 <= _MAX_MATCHED:
                mixing = mixing_from_spec(name, graph)
                # A family met before by another name (a hypercube of 4 is a ring) counts once.
                found.setdefault(mixing.digest, (spec, graph, mixing))
    best: dict[tuple[str, str], tuple[str, Graph, Mixing]] = {}
    for candidate in found.values():
        kind = (candidate[0].split(",")[0], candidate[2].name)
        if kind not in best or _worth(candidate[2]) > _worth(best[kind][2]):
            best[kind] = candidate
    if not best:
        raise UserError(
            f"no connected graph of {n} agents has at most {limit} neighbour an agent: use "
            f"--max-degree 2 or more"
        )
    return sorted(best.values(), key=lambda one: _worth(one[2]), reverse=True)


def check_words(specs: Sequence[str], mixing: str | None) -> None:
    """Raise a UserError where --suggest stands beside what it is to find."""
    if specs or mixing is not None:
        given = f"topology {specs[0]}" if specs else f"--mixing {mixing}"
        raise UserError(f"--suggest chooses topology and mixing itself: leave out {given}")


def config_lines(best: Report) -> str:
    """What to write under [agents] of a run's config."""
    return f'\ntopology = "{best["spec"]}"\nmixing = "{best["mixing"]}"'


def _known(n: int, limit: int) -> Iterator[tuple[str, Graph, Sequence[str]]]:
    for spec, mixings in _FAMILIES:
        try:
            graph = graph_from_spec(spec, n)
        except UserError:
            continue  # a number of agents that the family does not have
        if _most_neighbours(graph) <= limit:
            yield spec, graph, mixings


def _regular(n: int, limit: int) -> Iterator[tuple[str, Graph, Sequence[str]]]:
    degree = 3  # with 2 it is a ring
    while degree <= min(limit, n - 1):
        for seed in range(SEEDS) if n * degree % 2 == 0 else ():
            spec = f"regular:{degree},seed={seed}"
            try:
                graph = graph_from_spec(spec, n)
            except UserError:
                continue  # in parts
            yield spec, graph, (usual_mixing(graph),)
        degree = degree + 1 if degree < _EVERY_DEGREE else 2 * degree


def _most_neighbours(graph: Graph) -> int:
    return max(*graph.degrees, *(len(readers) for readers in graph.destinations))


def _worth(mixing: Mixing) -> tuple[float, float]:
    """Gap per message; of two that are equal, rounding apart, the one with the larger gap first."""
    gap = mixing.gap_per_turn
    return round(gap / float(sent_by_agent(mixing).mean()), 9), gap

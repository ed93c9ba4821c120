"""Graphs and mixing matrices from one string, as config files and command lines have them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable

from mpicdsgd.common.errors import UserError
from mpicdsgd.common.text import printable
from mpicdsgd.graphs import mixing_cycle, mixing_rules, topologies
from mpicdsgd.graphs.fastest_mixing import fastest
from mpicdsgd.graphs.graph import Graph
from mpicdsgd.graphs.graph_files import read_graph
from mpicdsgd.graphs.matrix_files import read_matrix
from mpicdsgd.graphs.mixing_cycle import Mixing

_PLAIN = {
    "complete": topologies.complete,
    "ring": topologies.ring,
    "chain": topologies.chain,
    "star": topologies.star,
    "hypercube": topologies.hypercube,
    "exponential": topologies.exponential,
    "expo": topologies.exponential,
}
_LATTICES = {"torus": topologies.torus, "grid": topologies.grid}
# Name, example, and the arguments it needs before the seed.
_RANDOM = {
    "regular": ("regular:4,seed=1", 1),
    "erdos-renyi": ("erdos-renyi:0.3,seed=2", 1),
    "watts-strogatz": ("watts-strogatz:4,0.1,seed=3", 2),
}
_GRAPHS = (*_PLAIN, *_LATTICES, *_RANDOM, "file")
_MATRICES: dict[str, Callable[[Graph], Mixing]] = {
    "uniform": mixing_rules.uniform,
    "metropolis": mixing_rules.metropolis,
    "max-degree": mixing_rules.max_degree,
    "out-degree": mixing_rules.out_degree,
    "fastest": fastest,
    "matchings": mixing_cycle.alternating_matchings,
    "one-peer": mixing_cycle.one_peer_on,
}
# (I + Pi)/2 halves the gap: so often and no oftener, before Pi is the identity for float64.
_MAX_LAZY = 10


def graph_from_spec(spec: str, n: int) -> Graph:
    """The graph of n agents that ``spec`` names.

    ``complete ring chain star hypercube exponential expo torus torus:4x4 grid grid:2x3
    regular:4,seed=1 erdos-renyi:0.3,seed=2 watts-strogatz:4,0.1,seed=3 file:net.edges``; a seed
    that is left out is 0. Files: ``graphs.graph_files.read_graph``.

    Raises:
        UserError: unknown name, arguments it does not take, n it cannot have, not connected, a bad
            file.
    """
    name, colon, rest = spec.strip().partition(":")
    if name == "file":
        return read_graph(_path(rest, "topology", "file:net.edges"), n)
    name = name.lower().replace("_", "-")
    if name in _PLAIN:
        if colon:
            raise UserError(f'topology {name} takes no arguments, got {rest[:60]!r}: use "{name}"')
        return _PLAIN[name](n)
    if name in _LATTICES:
        return _LATTICES[name](n, *_sizes(name, rest if colon else None))
    if name in _RANDOM:
        return _random_graph(name, rest, n)
    raise UserError(_unknown("topology", name, _GRAPHS))


def mixing_from_spec(spec: str, graph: Graph) -> Mixing:
    """The mixing matrix on ``graph`` that ``spec`` names, or the cycle of them.

    ``uniform metropolis max-degree out-degree fastest lazy:<another> file:pi.csv file:pi.npy
    file:pi.h5:dataset``, and in turn ``matchings one-peer cycle:a.csv,b.csv``. Files:
    ``graphs.matrix_files.read_matrix``.

    Raises:
        UserError: unknown name, a graph it does not fit, a bad file, a matrix that fails
            Assumption 2.
    """
    lazies, rest = 0, spec.strip()
    while rest.startswith("lazy:"):
        lazies, rest = lazies + 1, rest.removeprefix("lazy:").lstrip()
    if lazies > _MAX_LAZY:
        raise UserError(f"mixing lazy: nested {lazies} times: at most {_MAX_LAZY} leave a gap")
    name, colon, path = rest.partition(":")
    if name == "file":
        path = _path(path, "mixing", "file:pi.csv")
        result: Mixing = mixing_rules.from_matrix(
            read_matrix(path, graph.n), graph, f"file:{printable(path)}"
        )
    elif name == "cycle":
        paths = [part.strip() for part in path.split(",")]
        matrices = [read_matrix(_path(p, "mixing", "cycle:a.csv,b.csv"), graph.n) for p in paths]
        result = mixing_cycle.mixing_cycle(matrices, graph, f"cycle:{printable(path)}")
    elif (key := name.lower().replace("_", "-")) not in _MATRICES:
        if key == "lazy":
            raise UserError("mixing lazy needs another matrix after a colon, as in lazy:metropolis")
        raise UserError(_unknown("mixing", key, (*_MATRICES, "lazy", "file", "cycle")))
    elif colon:
        raise UserError(f'mixing {key} takes no arguments, got {path[:60]!r}: use "{key}"')
    else:
        result = _MATRICES[key](graph)
    for _ in range(lazies):
        result = mixing_cycle.lazy_cycle(result)
    return result


def _path(path: str, what: str, example: str) -> str:
    if not path.strip():
        raise UserError(
            f"{what} {example.partition(':')[0]}: needs a path after the colon, as in {example}"
        )
    return path.strip()


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    known = tuple(known)
    near = difflib.get_close_matches(name[:60], known, n=1)
    nearest = f' (did you mean "{near[0]}"?)' if near else ""
    return f"unknown {what} {name[:60]!r}{nearest}: allowed are {', '.join(known)}"


def _sizes(name: str, text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    rows, x, cols = text.lower().partition("x")
    # isdecimal before int(): no signs, underscores or blanks, and no numbers too long to convert.
    if not (x and all(part.isdecimal() and len(part) < 10 for part in (rows, cols))):
        raise UserError(
            f"topology {name} takes rows x columns, got {text[:60]!r}: write it as {name}:2x3"
        )
    return int(rows), int(cols)


def _random_graph(name: str, text: str, n: int) -> Graph:
    example, needed = _RANDOM[name]
    fields = [field.strip() for field in text.split(",")] if text else []
    seeds = [field.removeprefix("seed=") for field in fields if field.startswith("seed=")]
    values = [field for field in fields if not field.startswith("seed=")]
    malformed = UserError(
        f"cannot read topology {f'{name}:{text}'[:60]!r}: write for instance {example}"
    )
    if len(values) != needed or len(seeds) > 1:
        raise malformed
    seed = _whole(seeds[0], malformed) if seeds else 0
    if name == "regular":
        return topologies.random_regular(n, _whole(values[0], malformed), seed)
    if name == "erdos-renyi":
        return topologies.erdos_renyi(n, _real(values[0], malformed), seed)
    return topologies.watts_strogatz(
        n, _whole(values[0], malformed), _real(values[1], malformed), seed
    )


def _whole(text: str, malformed: UserError) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise malformed
    return int(text)


def _real(text: str, malformed: UserError) -> float:
    try:
        value = float(text)
    except ValueError:
        raise malformed from None
    if not math.isfinite(value):
        raise malformed
    return value

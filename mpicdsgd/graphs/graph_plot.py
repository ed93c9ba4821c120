"""A drawing of who talks to whom, with what weight. Matplotlib is imported only when drawing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from mpicdsgd.common.figures import COLOURS, INK, check_suffix, save
from mpicdsgd.common.text import agents_in_words
from mpicdsgd.graphs.graph import Graph
from mpicdsgd.graphs.mixing_cycle import Mixing

Positions = NDArray[np.float64]  # (N, 2)

_SPRINGS = 400  # agents up to which springs are let settle; networkx takes SciPy for more
_NUMBERED = 9.0  # points of diameter from which an agent has its number in it
_INCHES = 6.5
_INCHES_OF_SEVERAL = 4.2
_MARGIN = 0.25


def draw_graph(graph: Graph, mixing: Mixing | None, out: Path) -> None:
    """Draw the agents and their edges, as wide as their weights, lambda_2 and gap above. Local.

    A directed edge is an arrow from who is read to who reads. What wraps around in a torus is bent.

    Args:
        graph: who reads whom.
        mixing: the weights, of a cycle the mean over its turns; None: all edges alike.
        out: the file to write: .png, .pdf or .svg.

    Raises:
        UserError: ``out`` cannot be written or has another suffix.
    """
    draw_graphs([(graph, mixing)], out)


def draw_graphs(graphs: Sequence[tuple[Graph, Mixing | None]], out: Path) -> None:
    """Draw several as ``draw_graph`` does, side by side, by rows in the order given. Local.

    Raises:
        UserError: ``out`` cannot be written or has another suffix.
    """
    out = Path(out)
    check_suffix(out)
    from matplotlib.figure import Figure

    assert graphs, "nothing to draw"
    columns = math.ceil(math.sqrt(len(graphs)))
    rows = math.ceil(len(graphs) / columns)
    side = _INCHES if len(graphs) == 1 else _INCHES_OF_SEVERAL
    places = [layout(graph) for graph, _ in graphs]
    scales = [_scale(at_N2, side) for at_N2 in places]
    tallest = max(
        scale * float(np.ptp(_limits(at_N2)[:, 1]))
        for at_N2, scale in zip(places, scales, strict=True)
    )
    size = (columns * side, rows * (tallest + 0.7))
    figure = Figure(figsize=size, layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in cells[len(graphs) :]:
        axes.remove()
    for axes, one, at_N2, scale in zip(cells, graphs, places, scales, strict=False):
        axes.set_title(_title(*one), color=INK, fontsize=11 if len(graphs) == 1 else 8)
        _draw(axes, *one, at_N2, scale)
    save(figure, out)


def _limits(at_N2: Positions) -> Positions:
    """The lowest and the highest corner of a drawing, shape (2, 2)."""
    return np.stack([at_N2.min(axis=0) - _MARGIN, at_N2.max(axis=0) + _MARGIN])


def _scale(at_N2: Positions, side: float) -> float:
    """Inches per unit where no side is longer than ``side`` inches."""
    width, height = (float(length) for length in np.ptp(_limits(at_N2), axis=0))
    return min(side / width, side / height)


def _draw(axes: Any, graph: Graph, mixing: Mixing | None, at_N2: Positions, scale: float) -> None:
    from matplotlib.patches import FancyArrowPatch

    low, high = _limits(at_N2)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    axes.set_axis_off()
    # Agents never touch: 0.6 of the least distance, in points.
    size = float(np.clip(0.6 * 72 * scale * _least_distance(at_N2), 2, 30))
    edges = [(a, b) for a, b in graph.edges if graph.directed or a < b]
    Pi = _mean_weights(graph, mixing)
    weights = np.array([Pi[b, a] for a, b in edges])
    widest = float(np.abs(weights).max(initial=0.0)) or 1.0
    crowd = 2.6 / max(1.0, len(edges) / 60) ** 0.5
    both = set(graph.edges)
    for (a, b), weight in zip(edges, weights, strict=True):
        bend = 0.12 if graph.directed and (b, a) in both else 0.0
        if _passes_an_agent(at_N2, a, b):
            bend = 0.28
        axes.add_patch(
            FancyArrowPatch(
                tuple(at_N2[a]),
                tuple(at_N2[b]),
                arrowstyle="-|>" if graph.directed else "-",
                mutation_scale=9,
                connectionstyle=f"arc3,rad={bend}",
                shrinkA=size / 2 if graph.directed else 0,
                shrinkB=size / 2 if graph.directed else 0,
                lw=max(0.25, crowd * abs(float(weight)) / widest),
                color="#8a8a8a" if weight >= 0 else COLOURS[1],
                zorder=1,
            )
        )
    axes.scatter(
        at_N2[:, 0], at_N2[:, 1], s=size**2, color=COLOURS[0], edgecolors="white", lw=1, zorder=2
    )
    if size >= _NUMBERED:
        for agent, (x, y) in enumerate(at_N2):
            font = 0.42 * size / max(1, len(str(agent)) - 1) ** 0.3
            axes.text(
                x, y, str(agent), color="white", size=font, ha="center", va="center", zorder=3
            )


def layout(graph: Graph) -> Positions:
    """Where each agent is drawn, shape (N, 2), by the family that the graph's name tells."""
    n = graph.n
    family = graph.name.split(":")[0]
    sides = re.fullmatch(r"(?:torus|grid):(\d+)x(\d+)", graph.name)
    if sides and int(sides[1]) * int(sides[2]) == n:
        rows, columns = int(sides[1]), int(sides[2])
        cells = [(j % columns, -(j // columns)) for j in range(n)]
        return np.array(cells, dtype=np.float64) * (2.0 / max(rows, columns, 2))
    if family == "chain":
        return np.array([(2.0 * j / max(1, n - 1), 0.0) for j in range(n)])
    if family == "hypercube" and n in (1, 2, 4, 8, 16):
        return _hypercube(n.bit_length() - 1)
    if family == "star" and n > 2:
        return np.vstack([np.zeros((1, 2)), _circle(n - 1)])
    if family in ("ring", "complete", "exponential", "watts-strogatz") or n > _SPRINGS:
        return _circle(n)
    G = nx.Graph()
    G.add_nodes_from(range(n))
    G.add_edges_from(graph.edges)
    at = nx.spring_layout(G, pos=dict(enumerate(_circle(n))), iterations=200, seed=0)
    return np.array([at[j] for j in range(n)], dtype=np.float64).reshape(n, 2)


def _circle(n: int) -> Positions:
    """Clockwise from the top."""
    first = np.pi if n == 2 else np.pi / 2  # two lie side by side
    angle = first - 2 * np.pi * np.arange(n) / n
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) if n > 1 else np.zeros((1, 2))


def _hypercube(dimension: int) -> Positions:
    """Each bit moves an agent by its own vector: parallel edges stay parallel."""
    at = np.zeros((1, 2))
    for step in [(1.0, 0.0), (0.0, 1.0), (0.42, 0.3), (-0.3, 0.42)][:dimension]:
        at = np.vstack([at, at + step])
    return at * 1.2


def _least_distance(at_N2: Positions) -> float:
    apart = np.hypot(*(at_N2[:, np.newaxis] - at_N2[np.newaxis]).transpose(2, 0, 1))
    np.fill_diagonal(apart, np.inf)
    return float(min(apart.min(), 10.0))


def _passes_an_agent(at_N2: Positions, a: int, b: int) -> bool:
    """Whether the straight line from a to b would run through a third agent."""
    along = at_N2[b] - at_N2[a]
    length = float(np.hypot(*along))
    if length == 0:
        return False
    from_a = at_N2 - at_N2[a]
    part = from_a @ along / length**2
    off = np.abs(from_a[:, 0] * along[1] - from_a[:, 1] * along[0]) / length
    between = (part > 1e-6) & (part < 1 - 1e-6) & (off < 0.02 * length)
    between[[a, b]] = False
    return bool(between.any())


def _mean_weights(graph: Graph, mixing: Mixing | None) -> NDArray[np.float64]:
    if mixing is None:
        return graph.adjacency().astype(np.float64)
    return np.asarray(np.mean([turn.Pi for turn in mixing.turns], axis=0), np.float64)


def _title(graph: Graph, mixing: Mixing | None) -> str:
    agents = agents_in_words(graph.n)
    name = (graph.name or "graph").replace("$", r"\$")
    if mixing is None:
        return f"{name}, {agents}"
    spectrum = mixing.spectrum
    real = len(mixing.turns) == 1 and not graph.directed
    second = r"\lambda_2" if real else r"|\lambda_2|"
    figures = (
        rf"${second} = {round(spectrum.lambda_2, 12):.4g}$,  gap $= {round(spectrum.gap, 12):.4g}$"
    )
    if graph.edges:
        Pi = _mean_weights(graph, mixing)
        weights = [Pi[b, a] for a, b in graph.edges]
        low, high = float(min(weights)), float(max(weights))
        alike = high - low < 1e-9
        figures += f",  edge weights {low:.3g}" + ("" if alike else f" to {high:.3g}")
    turns = f" in {len(mixing.turns)} turns" if len(mixing.turns) > 1 else ""
    return f"{name}, {agents}, {mixing.name}{turns}\n{figures}"

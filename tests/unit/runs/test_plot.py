"""Plots: what is drawn is what was measured, and no global state of matplotlib is touched."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs import graph_plot, topologies
from mpicdsgd.graphs.graph import Graph
from mpicdsgd.graphs.mixing_rules import metropolis, uniform
from mpicdsgd.runs import plot


def line(epoch: float, *accuracy: float) -> dict[str, Any]:
    def spread(values: list[float]) -> dict[str, Any]:
        return {"mean": float(np.mean(values)), "std": float(np.std(values)), "agents": values}

    return {
        "step": int(epoch * 10),
        "epoch": epoch,
        "test_accuracy": spread(list(accuracy)),
        "test_loss": spread([1 - a for a in accuracy]),
        "train_loss": spread([0.9 - a for a in accuracy]),
        "averaged_model": {"test_accuracy": 0.99, "test_loss": 0.1},
        "consensus": {"max": 0.0 if epoch == 0 else 0.1, "rms": 0.0 if epoch == 0 else 0.05},
    }


def make_run(folder: Path, *lines: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (folder / "metrics.g0001.jsonl").write_text(text)
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    for module in (plot, graph_plot):
        save = module.save

        def keep(figure: Figure, out: Path, save: Any = save) -> None:
            figures.append(figure)
            save(figure, out)

        monkeypatch.setattr(module, "save", keep)
    return figures


def test_what_is_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    run = make_run(tmp_path / "ring", line(0, 0.1, 0.3), line(1, 0.5, 0.7), line(2, 0.8, 0.8))
    out = tmp_path / "new" / "plot.png"
    plot.plot_runs([run], out)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert os.listdir(out.parent) == ["plot.png"]
    accuracy, loss, consensus = drawn[0].axes
    mean, averaged = accuracy.lines
    assert mean.get_xdata().tolist() == [0, 1, 2]
    assert mean.get_ydata().tolist() == pytest.approx([0.2, 0.6, 0.8])
    assert averaged.get_ydata().tolist() == [0.99] * 3
    (band,) = accuracy.collections
    corners = band.get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (0.1, 0.8)
    assert loss.lines[1].get_ydata().tolist() == pytest.approx([0.7, 0.3, 0.1])
    assert consensus.get_yscale() == "log"
    assert math.isnan(consensus.lines[0].get_ydata()[0]), "zero has no place on a log axis"
    assert drawn[0].legends[0].get_texts()[0].get_text() == "ring: 80.0 % at the end"


def test_runs_have_their_colour_and_name(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [make_run(tmp_path / name, line(0, 0.1), line(1, 0.5)) for name in ("a/x", "b/x", "$_%")]
    plot.plot_runs(runs, tmp_path / "plot.svg")
    names = [text.get_text().split(":")[0] for text in drawn[0].legends[0].get_texts()]
    assert names == ["a/x", "b/x", r"\$_%"]
    colours = [line.get_color() for line in drawn[0].axes[0].lines]
    assert len(set(colours)) == 3
    assert colours[::2] == colours[1::2]


@pytest.mark.parametrize(
    "lines",
    [
        [line(1, 0.5)],
        [{"step": 1, "epoch": 0.5}, {"step": 2}],
        [
            {
                "step": 1,
                "epoch": 1,
                "test_accuracy": None,
                "consensus": [],
                "test_loss": {"agents": 3},
            }
        ],
        [{"step": 1, "epoch": 1, "test_accuracy": {"mean": "NaN", "agents": ["NaN", "x", None]}}],
        [line(0, 0.5), line(0, 0.5)],
    ],
)
def test_poor_metrics_are_drawn_as_far_as_they_go(
    tmp_path: Path, lines: list[dict[str, Any]]
) -> None:
    plot.plot_runs([make_run(tmp_path / "run", *lines)], tmp_path / "plot.pdf")
    assert (tmp_path / "plot.pdf").stat().st_size > 0


def test_mistakes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", line(0, 0.1))
    empty = make_run(tmp_path / "empty")
    (tmp_path / "file").touch()
    for runs, out, message in (
        ([tmp_path / "none"], "a.png", "no metrics"),
        ([run, empty], "a.png", "no evaluation yet"),
        ([], "a.png", "no run"),
        ([run], "a.gif", r"'\.gif': use \.png, \.pdf, \.svg"),
        ([run], "a", "suffix"),
        ([run], "file/a.png", "cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            plot.plot_runs(runs, tmp_path / out)
    with pytest.raises(UserError, match="suffix"):
        graph_plot.draw_graph(topologies.ring(3), None, tmp_path / "a.jpeg2")
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "run"]


GRAPHS = [
    topologies.complete(1),
    topologies.ring(2),
    topologies.ring(5),
    topologies.chain(5),
    topologies.star(6),
    topologies.hypercube(8),
    topologies.torus(12),
    topologies.exponential(8),
    topologies.random_regular(10, 3, seed=1),
]


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: f"{g.name}-{g.n}")
def test_every_agent_and_edge_is_drawn(tmp_path: Path, drawn: list[Figure], graph: Graph) -> None:
    mixing = uniform(graph) if graph.directed else metropolis(graph)
    graph_plot.draw_graph(graph, mixing, tmp_path / "graph.png")
    (axes,) = drawn[0].axes
    edges = len(graph.edges) if graph.directed else len(graph.edges) // 2
    assert len(axes.patches) == edges
    at_N2 = np.asarray(axes.collections[0].get_offsets())
    assert at_N2.shape == (graph.n, 2)
    apart = [np.hypot(*(a - b)) for i, a in enumerate(at_N2) for b in at_N2[:i]]
    assert min(apart, default=1.0) > 0.05, "no two agents on one spot"
    assert f"{graph.n} agent" in axes.get_title()
    assert f"{mixing.spectrum.gap:.4g}" in axes.get_title()


def test_several_graphs_side_by_side(tmp_path: Path, drawn: list[Figure]) -> None:
    graphs = [topologies.ring(4), topologies.star(5), topologies.chain(6)]
    graph_plot.draw_graphs([(graph, metropolis(graph)) for graph in graphs], tmp_path / "a.png")
    assert [len(axes.patches) for axes in drawn[0].axes] == [4, 4, 5]
    assert [axes.get_title().split(",")[0] for axes in drawn[0].axes] == ["ring", "star", "chain"]


def test_width_is_weight(tmp_path: Path, drawn: list[Figure]) -> None:
    graph = topologies.chain(4)
    graph_plot.draw_graph(graph, metropolis(topologies.chain(4)), tmp_path / "a.png")
    star = Graph.from_edges(4, [(0, 1), (1, 2), (1, 3), (2, 3)])
    graph_plot.draw_graph(star, metropolis(star), tmp_path / "b.png")
    widths = [patch.get_linewidth() for patch in drawn[1].axes[0].patches]
    weights = [metropolis(star).Pi[b, a] for a, b in star.edges if a < b]
    assert np.allclose(np.array(widths) / widths[-1], np.array(weights) / weights[-1])
    assert len({patch.get_linewidth() for patch in drawn[0].axes[0].patches}) == 1


def test_matplotlib_is_imported_only_to_draw(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", line(0, 0.1))
    code = (
        "import sys; from pathlib import Path; from mpicdsgd.runs import plot\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plot.plot_runs([Path({str(run)!r})], Path({str(tmp_path / 'a.png')!r}))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)

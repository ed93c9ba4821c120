"""Specs: every form of the string, and every mistake in one."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs import mixing_rules, topologies
from mpicdsgd.graphs.graph import Graph
from mpicdsgd.graphs.specs import graph_from_spec, mixing_from_spec


@pytest.mark.parametrize(
    ("spec", "n", "expected"),
    [
        ("complete", 4, topologies.complete(4)),
        (" Ring ", 5, topologies.ring(5)),
        ("chain", 3, topologies.chain(3)),
        ("star", 4, topologies.star(4)),
        ("torus", 12, topologies.torus(12, 3, 4)),
        ("torus:2x6", 12, topologies.torus(12, 2, 6)),
        ("torus:4x4", 16, topologies.torus(16)),
        ("grid", 6, topologies.grid(6, 2, 3)),
        ("grid:3x2", 6, topologies.grid(6, 3, 2)),
        ("hypercube", 8, topologies.hypercube(8)),
        ("expo", 6, topologies.exponential(6)),
        ("exponential", 6, topologies.exponential(6)),
        ("regular:4,seed=1", 9, topologies.random_regular(9, 4, 1)),
        ("regular:4", 9, topologies.random_regular(9, 4, 0)),
        ("erdos-renyi:0.6,seed=2", 9, topologies.erdos_renyi(9, 0.6, 2)),
        ("erdos_renyi:0.6, seed=2", 9, topologies.erdos_renyi(9, 0.6, 2)),
        ("watts-strogatz:4,0.1,seed=3", 9, topologies.watts_strogatz(9, 4, 0.1, 3)),
    ],
)
def test_graph_specs(spec: str, n: int, expected: Graph) -> None:
    assert graph_from_spec(spec, n) == expected


@pytest.mark.parametrize(
    ("spec", "n", "words"),
    [
        ("rign", 4, "unknown topology 'rign' (did you mean \"ring\"?): allowed are complete, ring"),
        ("torsu:4x4", 16, 'did you mean "torus"'),
        ("", 4, "unknown topology ''"),
        ("ring:3", 4, "takes no arguments, got '3': use \"ring\""),
        ("torus:4", 4, "rows x columns, got '4': write it as torus:2x3"),
        ("torus:", 4, "rows x columns"),
        ("torus:-2x-2", 4, "rows x columns"),
        ("torus:2x2x2", 8, "rows x columns"),
        ("torus:" + "9" * 5000 + "x1", 8, "rows x columns"),
        ("torus:4x4", 12, "use torus:3x4"),
        ("torus", 5, 'use topology = "ring"'),
        ("regular", 4, "write for instance regular:4,seed=1"),
        ("regular:a", 4, "write for instance regular:4,seed=1"),
        ("regular:2,seed=x", 4, "write for instance regular:4,seed=1"),
        ("regular:2,seed=1,seed=2", 4, "write for instance regular:4,seed=1"),
        ("regular:2,3", 4, "write for instance regular:4,seed=1"),
        ("erdos-renyi:nan", 4, "write for instance erdos-renyi:0.3,seed=2"),
        ("erdos-renyi:2", 4, "probability in 0 to 1"),
        ("erdos-renyi:0,seed=1", 4, "try another seed or a larger p"),
        ("watts-strogatz:4", 9, "write for instance watts-strogatz:4,0.1,seed=3"),
        ("file:", 4, "needs a path after the colon, as in file:net.edges"),
        ("file:nowhere.edges", 4, "cannot read nowhere.edges: No such file or directory"),
        ("file:net.gml", 4, "unknown suffix '.gml': allowed are .edges"),
        ("file:a\nb.edges", 4, "cannot read a\\nb.edges"),
        ("file:a\0b.edges", 4, "cannot read a\\x00b.edges: not a path"),
    ],
)
def test_graph_mistakes(spec: str, n: int, words: str) -> None:
    with pytest.raises(UserError) as caught:
        graph_from_spec(spec, n)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_mixing_specs(tmp_path: Path) -> None:
    ring = topologies.ring(5)
    assert mixing_from_spec("uniform", ring).digest == mixing_rules.uniform(ring).digest
    assert mixing_from_spec(" Metropolis ", ring).digest == mixing_rules.metropolis(ring).digest
    assert mixing_from_spec("max_degree", ring).digest == mixing_rules.max_degree(ring).digest
    # A chain of 3: cos(pi/3).
    assert mixing_from_spec("fastest", topologies.chain(3)).spectrum.gap == pytest.approx(0.5)
    assert mixing_from_spec("fastest", ring).name == "fastest"
    lazy = mixing_from_spec("lazy:lazy:max-degree", ring)
    assert lazy.name == "lazy:lazy:max-degree"
    assert np.array_equal(lazy.Pi, (3 * np.eye(5) + mixing_rules.max_degree(ring).Pi) / 4)
    path = tmp_path / "pi.npy"
    np.save(path, mixing_rules.uniform(ring).Pi)
    assert mixing_from_spec(f"file:{path}", ring).digest == mixing_rules.uniform(ring).digest
    assert mixing_from_spec(f"lazy:file:{path}", ring).name == f"lazy:file:{path}"
    with pytest.raises(UserError, match=r"pi\.npy: Pi\[0, 4\] = 0\.333333, but agent 0 does not"):
        mixing_from_spec(f"file:{path}", topologies.chain(5))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("metropolys", 'did you mean "metropolis"?): allowed are uniform, metropolis, max-degree'),
        ("", "unknown mixing ''"),
        ("uniform:2", "takes no arguments, got '2': use \"uniform\""),
        ("uniform", 'use mixing = "metropolis"'),
        ("lazy", "as in lazy:metropolis"),
        ("lazy:", "unknown mixing ''"),
        ("lazy:" * 5000 + "metropolis", "nested 5000 times"),
        ("file:", "as in file:pi.csv"),
        ("file:nowhere.csv", "cannot read nowhere.csv: No such file"),
        ("file:pi.mat", "unknown suffix '.mat': allowed are .csv"),
    ],
)
def test_mixing_mistakes(spec: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        mixing_from_spec(spec, topologies.star(4))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


NAMES = ["ring", "torus", "regular", "erdos-renyi", "watts-strogatz", "lazy", "file", "uniform"]


@given(st.sampled_from(NAMES), st.text("0123456789x.,=-+enaifsd:\n\0/ ", max_size=16))
def test_any_text_is_a_graph_or_a_user_error(name: str, rest: str) -> None:
    for read in (
        lambda: graph_from_spec(f"{name}:{rest}", 6).n,
        lambda: mixing_from_spec(f"{name}:{rest}", topologies.ring(6)).graph.n,
    ):
        try:
            n, message = read(), ""
        except UserError as error:
            n, message = 6, str(error)
        assert n == 6
        assert len(message.splitlines()) <= 1

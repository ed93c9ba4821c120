"""Graphs from files: what the formats say, and that damage is a UserError and nothing else."""

import json
import os
from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs import topologies
from mpicdsgd.graphs.graph import Graph
from mpicdsgd.graphs.graph_files import read_graph

XML = '<graphml xmlns="http://graphml.graphdrawing.org/xmlns">{}</graphml>'
BOMB = (
    '<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;">]>'
    "<graphml>&b;</graphml>"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


def read(folder: Path, name: str, content: str | bytes, n: int) -> Graph:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_graph(str(path), n)


def refusal(folder: Path, name: str, content: str | bytes, n: int) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, name, content, n)
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    assert len(message) < 400 + len(str(folder))
    return message


def test_edge_list(folder: Path) -> None:
    text = "\ufeff# a ring\n0 1 # first\n\n1,2\n 2\t3\r\n3, 0\n"
    graph = read(folder, "ring.edges", text, 4)
    assert graph.sources == topologies.ring(4).sources
    assert graph.name == f"file:{folder}/ring.edges"
    assert read(folder, "one.txt", "# nobody to talk to\n", 1).n == 1


def test_directed_edge_list_flows_from_first_to_second(folder: Path) -> None:
    graph = read(folder, "cycle.edges", "# c\ndirected\n0 1\n1 2\n2 0\n", 3)
    assert graph.directed
    assert graph.sources == ((2,), (0,), (1,))
    assert not read(folder, "line.edges", "undirected\n0 1\n", 2).directed


def test_merged_edges_are_remarked(folder: Path) -> None:
    graph = read(folder, "twice.edges", "0 1\n1 0\n1 1\n", 2)
    assert graph.edges == ((0, 1), (1, 0))
    assert len(graph.remarks) == 2


@pytest.mark.parametrize(
    ("text", "n", "words"),
    [
        ("0 1\n1 5\n", 3, "bad.edges:2: agent 5 is out of range: the run has 3 agents, 0 to 2"),
        ("0 1\n1 2 0.5\n", 3, "bad.edges:2: an edge is two agents, as in '0 1', got '1 2 0.5'"),
        ("0 1\nx y\n", 3, "bad.edges:2: an edge"),
        ("0 -1\n", 3, "bad.edges:1: an edge"),
        ("0 1_0\n", 30, "bad.edges:1: an edge"),
        ("0 " + "9" * 10000, 3, "bad.edges:1: an edge"),
        ("0 1\ndirected\n", 2, "bad.edges:2: an edge"),
        ("0 1\n", 3, "has 2 agents, the run has 3: start 2 agents or give another graph"),
        ("0 1\n2 3\n", 4, "parts are {0, 1}, {2, 3}"),
        ("directed\n0 1\n", 2, "not strongly connected"),
        (b"0 1\n\xff\xfe\n", 2, "bad.edges:2: not text in UTF-8"),
    ],
)
def test_bad_edge_lists(folder: Path, text: str, n: int, words: str) -> None:
    assert words in refusal(folder, "bad.edges", text, n)


def test_json(folder: Path) -> None:
    document = {"agents": 3, "directed": True, "edges": [[0, 1], [1, 2], [2, 0]]}
    graph = read(folder, "a.json", json.dumps(document), 3)
    assert graph.sources == ((2,), (0,), (1,))
    assert read(folder, "a.json", '{"agents": 1, "edges": []}', 1).n == 1


@pytest.mark.parametrize("key", ["edges", "links"])
def test_node_link(folder: Path, key: str) -> None:
    G = nx.DiGraph([(2, 0), (0, 1), (1, 2)])
    graph = read(folder, "b.json", json.dumps(nx.node_link_data(G, edges=key)), 3)
    assert graph.sources == ((2,), (0,), (1,))  # by label, though node 2 comes first in the file
    assert graph.remarks == ()
    named = json.dumps(nx.node_link_data(nx.path_graph(["x", "y", "z"]), edges=key))
    graph = read(folder, "b.json", named, 3)
    assert graph.sources == topologies.chain(3).sources
    assert "0: 'x', 1: 'y', 2: 'z'" in graph.remarks[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "bad.json:1: not JSON"),
        ("[" * 100_000, "bad.json: not a graph in JSON"),
        ('{"agents": ' + "9" * 10_000 + "}", "bad.json: not a graph in JSON"),
        ("[]", 'expected {"agents": N'),
        ('{"agents": true, "edges": []}', '"agents" must be the number of agents, got True'),
        ('{"agents": 4, "edges": []}', "has 4 agents, the run has 3"),
        ('{"agents": 3, "edges": 1}', '"edges" must be a list, got 1'),
        (
            '{"agents": 3, "edges": [[0, 1, 2]]}',
            "an edge is two agents, as in [0, 1], got [0, 1, 2]",
        ),
        ('{"agents": 3, "edges": [[0, true]]}', "an edge is two agents"),
        ('{"agents": 3, "edges": [[0, 3]]}', "number them from 0 to 2"),
        ('{"agents": 3, "edges": [], "directed": 1}', '"directed" must be true or false, got 1'),
        ('{"nodes": [{"id": 0}, {"id": 1}], "links": []}', "has 2 agents, the run has 3"),
        ('{"nodes": [0, 1, 2], "links": []}', '"id" must be a number or a name in each of 0'),
        ('{"nodes": [{"id": 0}, {"id": 0}, {"id": 1}], "links": []}', "ids must differ"),
        (
            '{"nodes": [{"id": 0}, {"id": 2}, {"id": 1}], "links": [{"source": 0, "target": 9}]}',
            "an edge names 9, which is not among the nodes",
        ),
    ],
)
def test_bad_json(folder: Path, text: str, words: str) -> None:
    assert words in refusal(folder, "bad.json", text, 3)


@pytest.mark.parametrize("directed", [False, True])
def test_graphml_of_networkx(folder: Path, directed: bool) -> None:
    expected = topologies.exponential(5) if directed else topologies.star(5)
    G = nx.DiGraph() if directed else nx.Graph()
    G.add_nodes_from([4, 2, 0, 1, 3])
    G.add_edges_from(expected.edges, weight=0.5)
    path = folder / "g.graphml"
    nx.write_graphml_xml(G, path)
    graph = read_graph(str(path), 5)
    assert graph.sources == expected.sources
    assert graph.directed == directed


def test_graphml_prefixed_labels_are_numbers(folder: Path) -> None:
    nodes = "".join(f'<node id="n{i}"/>' for i in (2, 0, 1))
    body = f'<graph edgedefault="undirected">{nodes}<edge source="n0" target="n1"/>' + (
        '<edge source="n1" target="n2"/></graph>'
    )
    assert read(folder, "n.graphml", XML.format(body), 3).sources == topologies.chain(3).sources


GRAPH = '<graph edgedefault="undirected"><node id="0"/><node id="1"/>{}</graph>'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "a DTD (<!DOCTYPE ...>) is not allowed in GraphML: remove it"),
        (BOMB.encode("utf-16"), "DTD"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>', "DTD"),
        ("<graphml>\n<graph>", "bad.graphml:2: not well-formed XML"),
        ("", "not well-formed"),
        ("<a>" * 100_000, "nested deeper"),
        (XML.format(""), "expected one <graph> in the file, found 0"),
        (XML.format(GRAPH.format("") * 2), "expected one <graph> in the file, found 2"),
        (XML.format(GRAPH.format("")), "parts are {0}, {1}"),
        (XML.format('<graph edgedefault="undirected"><node/></graph>'), "<node> without id"),
        (
            XML.format(GRAPH.format('<edge source="0"/>')),
            "bad.graphml:1: not a graph in GraphML: <edge> without target",
        ),
        (XML.format(GRAPH.format('<edge source="0" target="7"/>')), "has 3 agents, the run has 2"),
        (XML.format(GRAPH.format("<hyperedge/>")), "not a graph in GraphML"),
        ('<?xml version="1.0" encoding="klingon"?><a/>', "not XML in a known encoding"),
    ],
)
def test_bad_graphml(folder: Path, text: str | bytes, words: str) -> None:
    assert words in refusal(folder, "bad.graphml", text, 2)


def test_no_regular_file(folder: Path) -> None:
    pipe = folder / "pipe.edges"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="not a regular file"):
        read_graph(str(pipe), 3)
    (folder / "folder.json").mkdir()
    with pytest.raises(UserError, match="not a regular file"):
        read_graph(str(folder / "folder.json"), 3)
    huge = folder / "huge.edges"
    with huge.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(UserError, match="is it the right file"):
        read_graph(str(huge), 3)


SEEDS = [
    ("f.edges", b"directed\n0 1\n1 2\n2 0\n"),
    ("f.json", b'{"agents": 3, "directed": false, "edges": [[0, 1], [1, 2]]}'),
    ("f.json", b'{"nodes": [{"id": "a"}, {"id": "b"}, {"id": "c"}], "links": []}'),
    (
        "f.graphml",
        XML.format(
            '<key id="d0" for="edge" attr.name="w" attr.type="double"/>'
            '<graph edgedefault="directed"><node id="0"/><node id="1"/><node id="2"/>'
            '<edge source="0" target="1"><data key="d0">1</data></edge></graph>'
        ).encode(),
    ),
]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SEEDS), st.data())
def test_damaged_files(folder: Path, seed: tuple[str, bytes], data: st.DataObject) -> None:
    name, content = seed
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 8)))
    content = content[:start] + data.draw(st.binary(max_size=6)) + content[end:]
    try:
        n, message = read(folder, name, content, 3).n, ""
    except UserError as error:
        n, message = 3, str(error)
    assert n == 3
    assert len(message.splitlines()) <= 1

"""Graphs from files: edge list, JSON, GraphML. Whatever a file holds: a graph or a UserError.

    .edges .txt   a line an edge, "a b" or "a, b"; # begins a comment; "directed" may stand first
    .json         {"agents": N, "directed": false, "edges": [[0, 1], ...]}, or networkx's node-link
    .graphml      as networkx, Gephi, yEd or igraph write it; without a DTD

Agents are 0 to N - 1, and an edge (a, b) of a directed graph lets information flow from a to b.
Node-link and GraphML have labels: labels that are the numbers 0 to N - 1, alone or after a common
prefix ("n0", "n1"), are taken as such; others are numbered in the file's order, which a remark
says.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import warnings
import xml.parsers.expat
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import networkx as nx

from mpicdsgd.common.errors import UserError
from mpicdsgd.common.text import printable, shorten
from mpicdsgd.common.user_files import read_bytes, read_text
from mpicdsgd.graphs.graph import Graph

_MAX_BYTES = 64 << 20  # a complete graph of 3,000 agents as an edge list has 40 MB
_MAX_DEPTH = 64
_REQUIRED = {"node": ("id",), "edge": ("source", "target")}


def read_graph(path: str, n: int) -> Graph:
    """Read the graph of n agents from ``path``; its suffix picks the format.

    Raises:
        UserError: missing, unreadable or malformed file, another number of agents, not connected.
    """
    shown = printable(path)
    match Path(path).suffix.lower():
        case ".edges" | ".txt":
            return _read_edges(path, shown, n)
        case ".json":
            return _read_json(path, shown, n)
        case ".graphml":
            return _read_graphml(path, shown, n)
        case suffix:
            raise UserError(
                f"topology file {shown}: unknown suffix {printable(suffix)!r}: allowed are .edges, "
                f".txt, .json, .graphml"
            )


def _read_edges(path: str, shown: str, n: int) -> Graph:
    edges: list[tuple[int, int]] = []
    directed: bool | None = None
    for number, line in enumerate(read_text(path, shown, _MAX_BYTES).splitlines(), start=1):
        fields = line.partition("#")[0].replace(",", " ").split()
        if not fields:
            continue
        if directed is None:
            directed = fields == ["directed"]
            if directed or fields == ["undirected"]:
                continue
        # isdecimal and the length before int(): "1_0", "-1" and a million digits are no agents.
        if len(fields) != 2 or not all(f.isdecimal() and len(f) < 10 for f in fields):
            raise UserError(
                f"{shown}:{number}: an edge is two agents, as in '0 1', got {line.strip()[:60]!r}"
            )
        a, b = int(fields[0]), int(fields[1])
        if max(a, b) >= n:
            raise UserError(
                f"{shown}:{number}: agent {max(a, b)} is out of range: the run has {n} agents, "
                f"0 to {n - 1}: change the file or the number of agents"
            )
        edges.append((a, b))
    _check_agents(1 + max((max(e) for e in edges), default=0), n, shown)
    return Graph.from_edges(n, edges, directed=bool(directed), name=f"file:{shown}")


def _read_json(path: str, shown: str, n: int) -> Graph:
    text = read_text(path, shown, _MAX_BYTES)
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{shown}:{error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError):
        # A number of more digits than Python converts, or lists nested too deep.
        raise UserError(f"{shown}: not a graph in JSON: numbers or nesting too large") from None
    if not isinstance(document, dict):
        raise UserError(f'{shown}: expected {{"agents": N, "directed": false, "edges": [...]}}')
    directed = document.get("directed", False)
    if not isinstance(directed, bool):
        raise UserError(f'{shown}: "directed" must be true or false, got {_brief(directed)}')
    if "nodes" in document:
        labels = [_field(node, "id", shown) for node in _list(document, "nodes", shown)]
        key = "links" if "links" in document else "edges"
        pairs = [
            (_field(edge, "source", shown), _field(edge, "target", shown))
            for edge in _list(document, key, shown)
        ]
        return _from_labels(labels, pairs, directed, shown, n)
    agents = document.get("agents")
    if not _is_agent(agents):
        raise UserError(f'{shown}: "agents" must be the number of agents, got {_brief(agents)}')
    _check_agents(agents, n, shown)
    edges = _list(document, "edges", shown)
    for edge in edges:
        if not (
            isinstance(edge, list) and len(edge) == 2 and all(_is_agent(agent) for agent in edge)
        ):
            raise UserError(f"{shown}: an edge is two agents, as in [0, 1], got {_brief(edge)}")
    return Graph.from_edges(n, edges, directed=directed, name=f"file:{shown}")


def _read_graphml(path: str, shown: str, n: int) -> Graph:
    data = read_bytes(path, shown, _MAX_BYTES)
    _check_xml(data, shown)
    try:
        # networkx warns of what it leaves out (ports, types): of no account to who reads whom.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            G = nx.read_graphml(io.BytesIO(data))
    except Exception as error:  # a reader of ours would raise one kind; networkx raises any
        reason = printable(str(error))[:120] or type(error).__name__
        raise UserError(f"{shown}: not a graph in GraphML: {reason}") from None
    return _from_labels(list(G.nodes), list(G.edges()), G.is_directed(), shown, n)


def _check_xml(data: bytes, shown: str) -> None:
    """Refuse what is not well-formed, and what could make a parser use all memory or more files."""
    parser = xml.parsers.expat.ParserCreate()
    depth = graphs = 0

    def refuse(*_: object) -> None:
        raise UserError(f"{shown}: a DTD (<!DOCTYPE ...>) is not allowed in GraphML: remove it")

    def deeper(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth, graphs
        depth += 1
        kind = tag.rpartition(":")[2]
        graphs += kind == "graph"
        for key in _REQUIRED.get(kind, ()):  # networkx would go on with a node called "None"
            if key not in attributes:
                line = parser.CurrentLineNumber
                raise UserError(f"{shown}:{line}: not a graph in GraphML: <{kind}> without {key}")
        if depth > _MAX_DEPTH:
            raise UserError(f"{shown}: not a graph in GraphML: nested deeper than {_MAX_DEPTH}")

    def higher(*_: object) -> None:
        nonlocal depth
        depth -= 1

    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = deeper
    parser.EndElementHandler = higher
    try:
        parser.Parse(data, True)
    except xml.parsers.expat.ExpatError as error:
        reason = xml.parsers.expat.ErrorString(error.code)
        raise UserError(f"{shown}:{error.lineno}: not well-formed XML: {reason}") from None
    except (ValueError, LookupError) as error:
        # From Python's side of the parser: an encoding that it does not know or cannot use.
        if isinstance(error, UserError):
            raise
        raise UserError(f"{shown}: not XML in a known encoding: write it as UTF-8") from None
    if graphs != 1:  # networkx reads the first and leaves out nested ones, without a word
        raise UserError(f"{shown}: expected one <graph> in the file, found {graphs}")


def _from_labels(
    labels: Sequence[Hashable],
    pairs: Sequence[tuple[Hashable, Hashable]],
    directed: bool,
    shown: str,
    n: int,
) -> Graph:
    """The graph with labels turned into agents, as the top of this file says."""
    _check_agents(len(labels), n, shown)
    matches = [re.fullmatch(r"(\D*)([0-9]{1,9})", str(label)) for label in labels]
    numbers = [int(m[2]) for m in matches if m]
    numbered = sorted(numbers) == list(range(n)) and len({m[1] for m in matches if m}) == 1
    agents = {label: numbers[i] if numbered else i for i, label in enumerate(dict.fromkeys(labels))}
    if len(agents) != n:
        raise UserError(f"{shown}: the nodes' ids must differ from each other")
    for label in (label for pair in pairs for label in pair):
        if label not in agents:
            raise UserError(f"{shown}: an edge names {_brief(label)}, which is not among the nodes")
    edges = [(agents[a], agents[b]) for a, b in pairs]
    graph = Graph.from_edges(n, edges, directed=directed, name=f"file:{shown}")
    if numbered:
        return graph
    mapping = shorten([f"{agent}: {_brief(label)}" for label, agent in agents.items()])
    remark = f"graph file:{shown}: agents numbered in the file's order: {mapping}"
    return dataclasses.replace(graph, remarks=(*graph.remarks, remark))


def _check_agents(found: int, n: int, shown: str) -> None:
    if found != n:
        raise UserError(
            f"{shown} has {_brief(found)} agents, the run has {n}: start {_brief(found)} agents or "
            f"give another graph"
        )


def _is_agent(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)  # true is an int in Python


def _list(document: dict[str, Any], key: str, shown: str) -> list[Any]:
    value = document.get(key)
    if not isinstance(value, list):
        raise UserError(f'{shown}: "{key}" must be a list, got {_brief(value)}')
    return value


def _field(item: object, key: str, shown: str) -> int | str:
    value = item.get(key) if isinstance(item, dict) else None
    if isinstance(value, str) or _is_agent(value):
        return value
    raise UserError(f'{shown}: "{key}" must be a number or a name in each of {_brief(item)}')


def _brief(value: object) -> str:
    """``value`` in at most 60 printable characters."""
    try:
        return printable(repr(value))[:60]
    except (ValueError, RecursionError):  # an int of too many digits
        return "a number too large"

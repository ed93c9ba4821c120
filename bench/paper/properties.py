"""Table 1 of the paper beside what was measured of each algorithm."""

from __future__ import annotations

import common
import numpy as np

from mpicdsgd.common.errors import UserError
from mpicdsgd.models import build
from paper.part import CLASSES, SHAPES, Part
from paper.rules import EQUAL

# Whom an agent exchanges with, and whether on a graph of one's own choice (Table 1's C.C.T.).
_PEERS = {
    "sgd": ("all, by Allreduce", False),
    "msgd": ("all, by Allreduce", False),
    "cdsgd": ("neighbours, each step", True),
    "icdsgd": ("neighbours, each round", True),
    "cdmsgd": ("neighbours, each step", True),
    "fedavg": ("all, by Allreduce, each round", False),
    "easgd": ("all, by Allreduce, each period", False),
    "eamsgd": ("all, by Allreduce, each period", False),
    "downpour": ("the server", False),
    "gossip": ("one neighbour at random", True),
    "gosgd": ("one neighbour at random", True),
}
# Data parallel, decentralised computation, constrained topology, as the paper's Table 1 has it.
_IN_THE_PAPER = {
    "sgd": "no, no, no",
    "downpour": "yes, no, no",
    "easgd": "no, no, no",
    "gossip": "no, yes, no",
    "fedavg": "yes, no, no",
    "cdsgd": "yes, yes, yes",
}


def properties(part: Part) -> list[str]:
    """Table 1 of the paper, as far as it can be measured; without the one-machine baselines."""
    ready = {s.label: (s.agents, c) for s in part.setups["algorithms"]
             if s.agents > 1 and (c := part.found["algorithms", s.label]) is not None}  # fmt: skip
    if not ready:
        return []
    goal = max(float(c.late("test").mean()) for _, c in ready.values()) - EQUAL
    rows = []
    for label, (agents, one) in ready.items():
        settings = part.settings["algorithms", label]
        optim = settings["optim"]["name"]
        server = settings["ranks"] > agents
        peers, on_graph = _PEERS.get(optim, ("neighbours, each step", True))
        if server:
            peers = "the server"
        reached = np.flatnonzero(one.values["test"].mean(axis=0) >= goal)
        sent = float((one.values["bytes"][:, -1] / one.values["step"][:, -1]).mean())
        waited_s = one.values["wait_s"][:, -1] / one.values["step"][:, -1]
        size = _model_bytes(part.name, settings)
        decentralised = "yes" if on_graph else "no"
        rows.append([
            label,
            _IN_THE_PAPER.get(optim, "-"),
            f"yes, {decentralised}, {decentralised}",
            f"{one.epoch[reached[0]]:g}" if len(reached) else "-",
            f"{sent:,.0f}",
            f"{sent / size:.2f}" if size else "-",
            peers,
            "yes" if server else "no",
            f"{one.late('consensus').mean():.2g}",
            f"{1e3 * float(np.median(waited_s)):.1f}",
        ])  # fmt: skip
    head = ["", "in the paper", "here", "epochs to it", "bytes an agent and step", "in models",
            "exchanges with", "server", "consensus distance", "ms a step waited"]  # fmt: skip
    return [
        f"## Table 1, measured: {part.title}",
        "",
        "*In the paper* and *here*: data parallel (each agent has a share of its own), "
        "decentralised computation (no server, no Allreduce), constrained communication topology "
        "(any connected graph will do). All here are data parallel, SGD and EASGD too, and gossip "
        "goes over a graph's edges. "
        f"*Epochs to it*: until the mean test accuracy is {goal:.2f}, {EQUAL:g} point below the "
        "best of these at the end. A server's bytes are no agent's and not counted. The paper's "
        "step sizes and rates are theory, which so few epochs cannot show.",
        "",
        *common.table(head, rows),
        "",
    ]


def _model_bytes(data: str, settings: common.Record) -> int:
    """float32 parameters of the model; 0 where it is not known."""
    config = build.ModelConfig(**settings["model"])
    try:
        model = build.build(config, SHAPES[data], CLASSES[data])
    except (UserError, KeyError):
        return 0
    return 4 * sum(p.numel() for p in model.parameters())

"""The page `paper.md`: claims, tables and figures, from what the runs have measured."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

import common
import numpy as np
from paper_claims import CLAIMS, EQUAL, POINTS, Claim, Verdict, decide
from paper_curves import LATE, Curves, deviation
from paper_runs import DATA_TITLES, SCALES, TITLES, Setup

from mpicdsgd import models
from mpicdsgd.errors import UserError

ANSWERS = {True: "yes", False: "no", None: "not testable here"}
_SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32),
           "digits": (1, 8, 8)}  # fmt: skip
_CLASSES = {"mnist": 10, "cifar10": 10, "cifar100": 100, "digits": 10}
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


@dataclass
class Part:
    """What was found on one data set.

    Args:
        name, title: of the data set.
        found: curves by (experiment, label), None where no seed is finished.
        setups: by experiment.
        settings: resolved, by (experiment, label).
        lambda_2: of the mixing matrix, by (experiment, label).
        figures: file names, by experiment.
    """

    name: str
    title: str
    found: dict[tuple[str, str], Curves | None]
    setups: dict[str, list[Setup]]
    settings: dict[tuple[str, str], common.Record]
    lambda_2: dict[tuple[str, str], float] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)


def verdicts(part: Part) -> list[tuple[Claim, Verdict]]:
    return [(claim, decide(claim, part.found)) for claim in CLAIMS]


def page(
    record: common.Record, parts: Sequence[Part], failed: Sequence[common.Record],
    missing: Sequence[str], unfinished: int,
) -> str:  # fmt: skip
    """The whole page.

    Args:
        record: its beginning: `common.provenance` and the arguments.
        failed: of every failed run its name, seed, command and what it said.
        missing: data sets of the scale that are not there.
        unfinished: runs that there are no metrics of yet, failed ones included.
    """
    scale = SCALES[record["scale"]]
    changed = " (with changes)" if record["dirty"] else ""
    out = [
        "# The paper's experiments",
        "",
        f"Made by `python bench/paper.py --scale {record['scale']}` at commit "
        f"{record['commit'][:10]}{changed}, on {record['cpu']}, {record['cores']} cores, device "
        f"{record['device']}; torch {record['versions']['torch']}. Seeds: {record['seeds']}; ± is "
        "the standard deviation over seeds in tables, half the 95% confidence interval in claims.",
        "",
        f"All runs are `mpiexec -n N mpicdsgd train jobs/mnist.toml`, with `{scale.common}`",
    ]
    out += [f"and on {part.title} `{more}`" for part in parts if (more := scale.data[part.name][0])]
    if record["overrides"]:
        out.append(f"and, as this was asked for, `{shlex.join(record['overrides'])}`")
    out.append("")
    for name in missing:
        out += [f"**{DATA_TITLES[name]} was not there and is left out.**", ""]
    if unfinished:
        out += [f"**Runs that are not finished: {unfinished}.** What is below is without them.", ""]
    if failed:
        out += ["## Failed runs", ""]
        out += [f"- {one['name']}: exit code {one['code']}, {one['said']}" for one in failed]
        out.append("")
    for part in parts:
        out += _claims(part)
    for part in parts:
        for experiment in part.setups:
            out += _experiment(part, experiment)
    for part in parts:
        if "algorithms" in part.setups:
            out += _properties(part)
    out += _differences(record["scale"])
    return "\n".join(out).rstrip() + "\n"


def _claims(part: Part) -> list[str]:
    rows = [
        [claim.text, claim.where, ANSWERS[v.seen], v.numbers, claim.rule]
        for claim, v in verdicts(part)
    ]
    return [
        f"## Section 5's claims on {part.title}",
        "",
        f"Accuracies are means over agents, in percent; *early* is the mean over the first third "
        f"of the epochs, *late* of the last {LATE} evaluations; *sure* is more than half the 95% "
        f"confidence interval over seeds, pair by pair. Differences below {POINTS} points are "
        f"none; {EQUAL:g} point apart is equal.",
        "",
        *_table(["claim", "step sizes", "seen", "numbers", "rule"], rows),
        "",
    ]


def _experiment(part: Part, experiment: str) -> list[str]:
    rows = []
    for setup in part.setups[experiment]:
        one = part.found[experiment, setup.label]
        cells = ["-"] * 8 if one is None else _cells(one)
        lambda_2 = f"{part.lambda_2[experiment, setup.label]:.3f}"
        rows.append([setup.label, str(setup.agents), lambda_2, *cells, f"`{setup.settings}`"])
    head = ["", "agents", "lambda_2", "training, %", "test, %", "gap", "std over agents",
            "averaged or centre, %", "training loss", "test loss", "consensus",
            "settings"]  # fmt: skip
    out = [f"## {TITLES[experiment]}: {part.title}", ""]
    if name := part.figures.get(experiment):
        out += [f"![{TITLES[experiment]}, {part.title}]({name})", ""]
    return [*out, *_table(head, rows), ""]


def _cells(one: Curves) -> list[str]:
    def text(name: str, form: str = ".2f") -> str:
        late_S = one.late(name)
        return f"{late_S.mean():{form}} ± {deviation(late_S):{form}}"

    # Where an algorithm has a centre, that is the model it trains.
    model = "averaged" if np.isnan(one.late("centre")).all() else "centre"
    accuracies = [text(name) for name in ("train", "test", "gap", "std", model)]
    return [*accuracies, text("train_loss", ".3f"), text("test_loss", ".3f"),
            text("consensus", ".2g")]  # fmt: skip


def _properties(part: Part) -> list[str]:
    """Table 1 of the paper, as far as it can be measured."""
    ready = {s.label: c for s in part.setups["algorithms"]
             if (c := part.found["algorithms", s.label]) is not None}  # fmt: skip
    if not ready:
        return []
    goal = max(float(c.late("test").mean()) for c in ready.values()) - EQUAL
    rows = []
    for label, one in ready.items():
        settings = part.settings["algorithms", label]
        optim = settings["optim"]["name"]
        agents = next(s.agents for s in part.setups["algorithms"] if s.label == label)
        server = settings["ranks"] > agents
        peers, on_graph = _PEERS.get(optim, ("neighbours, each step", True))
        if server:
            peers = "the server"
        reached = np.flatnonzero(one.values["test"].mean(axis=0) >= goal)
        sent = float((one.values["bytes"][:, -1] / one.values["step"][:, -1]).mean())
        size = _model_bytes(part.name, settings)
        rows.append([
            label,
            f"{one.epoch[reached[0]]:g}" if len(reached) else "-",
            f"{sent:,.0f}",
            f"{sent / size:.2f}" if size else "-",
            peers,
            "yes" if server else "no",
            "yes" if on_graph else "no",
            f"{one.late('consensus').mean():.2g}",
            f"{1e3 * float((one.values['wait_s'][:, -1] / one.values['step'][:, -1]).mean()):.1f}",
        ])  # fmt: skip
    head = ["", "epochs to it", "bytes an agent and step", "in models", "exchanges with",
            "server", "any graph", "consensus distance", "ms a step waited"]  # fmt: skip
    return [
        f"## Table 1, measured: {part.title}",
        "",
        f"*Epochs to it*: until the mean test accuracy is {goal:.2f}, {EQUAL:g} point below the "
        "best of all at the end. *Data parallel* holds for all: each agent has a share of its "
        "own. The paper's *decentralised computation* is no server and no Allreduce, its "
        "*constrained communication topology* that any connected graph will do: both are the "
        "column *any graph*. A server's bytes are no agent's and not counted. Its step sizes and "
        "rates are theory, which so few epochs cannot show.",
        "",
        *_table(head, rows),
        "",
    ]


def _model_bytes(data: str, settings: common.Record) -> int:
    """float32 parameters of the model; 0 where it is not known."""
    config = models.ModelConfig(**settings["model"])
    try:
        model = models.build(config, _SHAPES[data], _CLASSES[data])
    except (UserError, KeyError):
        return 0
    return 4 * sum(p.numel() for p in model.parameters())


def _differences(scale_name: str) -> list[str]:
    """What is not as in the paper, for who compares the numbers."""
    out = [
        "## Not as in the paper",
        "",
        "- Inputs are normalised by the training set's mean and deviation.",
        "- The training accuracy is each agent's on its own share, all of it; the paper's is on "
        "the whole training set.",
        "- *SGD, one machine* is the paper's baseline: minibatches of the same size from all the "
        "data, N times as many steps in an epoch. *Allreduce* takes as many steps as the agents.",
        "- At step size 0.01 for all, momentum 0.95 makes steps 20 times as large: that comparison "
        "is the paper's. *All algorithms* is the one on equal footing, 0.01 with momentum and "
        f"{0.2 * SCALES[scale_name].rate:g} without; EASGD, GoSGD and Downpour have rates of "
        "their own. They are those by which an MLP reached 97.5% on the whole of MNIST in 15 "
        "epochs; for the CNN, those without momentum are halved.",
        "- Fig. 2(b) is with 8 agents, which have more graphs between complete and ring than 5. "
        "The chain is not regular and has Metropolis weights; all others are uniform.",
    ]
    if scale_name == "cpu":
        out.append(
            "- A small MLP in place of the CNN, the first 10,000 images, and batch 32 in place of "
            "128, so that an epoch has about as many steps as the paper's; 2,000 test images, so "
            "that one image is 0.05 points."
        )
    return out


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |"
            for cells in (head, ["---"] * len(head), *rows)]  # fmt: skip

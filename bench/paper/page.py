"""The page `paper.md`: claims, tables and figures, from what the runs have measured."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import common
import numpy as np

from paper import consensus
from paper.claims import CLAIMS, Claim, decide
from paper.curves import LATE, Curves, deviation
from paper.part import Part, remarks
from paper.properties import properties
from paper.rules import EQUAL, POINTS, Verdict
from paper.runs import DATA_TITLES, SCALES, TITLES

ANSWERS = {True: "yes", False: "no", None: "not testable here"}


def verdicts(part: Part) -> list[tuple[Claim, Verdict]]:
    """Of the claims whose experiments are part of what was to be run on this data set."""
    return [(claim, decide(claim, part.found, part.guess)) for claim in CLAIMS
            if all(experiment in part.setups for experiment, _ in claim.setups)]  # fmt: skip


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
        f"Made by `python bench/paper/run.py --scale {record['scale']}` at commit "
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
    if any("JPEG" in part.title for part in parts):
        out += [
            "*(JPEG)*: each image of this copy went through JPEG once, so the pixels are not "
            "quite CIFAR-10's own; compare its numbers with each other only.",
            "",
        ]
    for part in parts:
        out += _claims(part)
    for part in parts:
        for experiment in part.setups:
            out += _experiment(part, experiment, record["seeds"])
    for part in parts:
        if "algorithms" in part.setups:
            out += properties(part)
    for part in parts:
        if part.radii:
            out += consensus.section(
                part.title,
                {f"{TITLES[e].split(':')[0]}, {name}": r for (e, name), r in part.radii.items()},
            )
    out += _differences(record["scale"])
    return "\n".join(out).rstrip() + "\n"


def _claims(part: Part) -> list[str]:
    rows = [
        [claim.text, claim.where, ANSWERS[v.seen], v.numbers, claim.rule]
        for claim, v in verdicts(part)
    ]
    return [
        f"## The paper's claims on {part.title}",
        "",
        *_not_judged(part),
        f"Accuracies are means over agents, in percent; *early* is the mean over the first third "
        f"of the epochs, *late* of the last {LATE} evaluations; *sure* is more than half the 95% "
        f"confidence interval over seeds, pair by pair. Differences below {POINTS} points are "
        f"none; {EQUAL:g} point apart is equal. *On own shares*: an agent's training accuracy is "
        "on its own share, which is the smaller the more agents there are and the sooner learnt by "
        "heart, so agents that mix less may look faster there than they are.",
        "",
        *common.table(["claim", "step sizes", "seen", "numbers", "rule"], rows),
        "",
    ]


def _not_judged(part: Part) -> list[str]:
    absent = sorted({e for claim in CLAIMS for e, _ in claim.setups} - part.setups.keys())
    if not absent:
        return []
    names = "; ".join(TITLES[e] for e in absent)
    return [f"Without the claims of experiments that were not run on {part.title}: {names}.", ""]


def _experiment(part: Part, experiment: str, seeds: int) -> list[str]:
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
    out += [*common.table(head, rows), ""]
    if said := remarks(part, experiment, seeds):
        out += [*said, ""]
    return out


def _cells(one: Curves) -> list[str]:
    def text(name: str, form: str = ".2f") -> str:
        late_S = one.late(name)
        return f"{late_S.mean():{form}} ± {deviation(late_S):{form}}"

    # Where an algorithm has a centre, that is the model it trains.
    model = "averaged" if np.isnan(one.late("centre")).all() else "centre"
    accuracies = [text(name) for name in ("train", "test", "gap", "std", model)]
    return [*accuracies, text("train_loss", ".3f"), text("test_loss", ".3f"),
            text("consensus", ".2g")]  # fmt: skip


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
            "- A small MLP in place of the CNN (but in *The authors' CNN*, of 8 epochs), the first "
            "10,000 images, and batch 32 in place of 128, so that an epoch has about as many steps "
            "as the paper's; 2,000 test images, so that one image is 0.05 points."
        )
    return out

"""Starting the runs of `run.py`, each as a user would, and each only once.

A run's folder is named by a hash of its resolved settings and its ranks, so what has changed is
another run, and a configuration that several figures share is one. `run.json` beside the metrics
has the settings in full. A run is finished when its metrics have the last epoch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import common

from mpicdsgd.algorithms.config import needs_server
from mpicdsgd.common.errors import UserError
from mpicdsgd.graphs.specs import graph_from_spec, mixing_from_spec
from mpicdsgd.runs import metrics_file
from mpicdsgd.runs.config import as_json, check, load_config
from paper.runs import SCALES, Setup

CONFIG = common.HERE.parent / "jobs" / "mnist.toml"
# Not part of what a run is: where it lies and how much of it is kept.
_PLACE = ("dir", "resume", "keep", "checkpoint_every", "tensorboard")


@dataclass(frozen=True)
class Source:
    """A data set that is there.

    Args:
        name: of `data.name`.
        title: on the page.
        path: its folder; empty where it needs none.
    """

    name: str
    title: str
    path: str


@dataclass(frozen=True)
class Run:
    """One seed of a setup.

    Args:
        overrides: of `jobs/mnist.toml`, without `run.dir`.
        folder: where it lies.
        settings: resolved, of which the folder's name is the hash.
    """

    overrides: tuple[str, ...]
    ranks: int
    folder: Path
    settings: common.Record
    estimate_s: float


def make(
    setup: Setup, seed: int, scale_name: str, source: Source, device: str, more: Sequence[str],
    runs: Path,
) -> Run:  # fmt: skip
    """The run of a setup and a seed. ``more``: the user's overrides, which come last.

    Raises:
        UserError: no run could have these settings.
    """
    scale = SCALES[scale_name]
    overrides = (
        *shlex.split(scale.common),
        *shlex.split(scale.data[source.name][0]),
        *shlex.split(setup.settings),
        f"data.name={source.name}",
        f"data.path={source.path}",
        f"agents.device={'cuda:0' if device == 'cuda' else 'cpu'}",
        "run.evaluate_train=true",
        "run.resume=auto",
        "run.keep=1",
        f"run.seed={seed}",
        *more,
    )
    config = load_config(CONFIG, overrides)
    if config.optim.name == "cdsgd":  # for Proposition 1
        overrides = (*overrides, "run.theory=true")
        config = load_config(CONFIG, overrides)
    check(config)
    mixing_from_spec(config.agents.mixing, graph_from_spec(config.agents.topology, setup.agents))
    settings = as_json(dataclasses.asdict(config))
    for key in _PLACE:
        del settings["run"][key]
    del settings["data"]["path"]
    settings["data"]["title"] = source.title  # the same data may lie elsewhere, but not others
    ranks = setup.agents + needs_server(config.optim)
    settings["ranks"] = ranks
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    name = f"{source.name}-{config.optim.name.replace(':', '-')}-{setup.agents}-s{seed}-{digest}"
    per_epoch = setup.cost * sum(
        s * n for s, n in zip(scale.epoch_s[source.name], (1, setup.agents), strict=True)
    )
    start_s = scale.start_s[0] + scale.start_s[1] * ranks
    estimate_s = start_s + config.run.epochs * per_epoch
    return Run(overrides, ranks, runs.resolve() / name, settings, estimate_s)


@cache
def _launcher(ranks: int) -> tuple[str, ...]:
    return tuple(common.mpiexec(ranks))


def metrics(run: Run) -> list[common.Record]:
    """The lines of a finished run; none where it is not finished."""
    note = noted(run)
    if note is None or note["settings"] != run.settings:
        return []
    try:
        lines = metrics_file.read(run.folder)
    except UserError:
        return []
    whole = lines and lines[-1]["epoch"] >= run.settings["run"]["epochs"]
    return lines if whole else []


def noted(run: Run) -> common.Record | None:
    """What `run.json` says, where there is one."""
    try:
        found: common.Record = json.loads((run.folder / "run.json").read_text())
    except (OSError, ValueError):
        return None
    return found


def command(run: Run) -> list[str]:
    return [*_launcher(run.ranks), sys.executable, "-m", "mpicdsgd", "train", str(CONFIG),
            *run.overrides, f"run.dir={run.folder}"]  # fmt: skip


def execute(run: Run, commit: str, words: Sequence[str] | None = None) -> common.Record:
    """Start a run, or let it go on, and wait for its end. Returns what `run.json` then says.

    Args:
        commit: of the checkout, to be noted.
        words: the command, if another than the run's own.
    """
    note: common.Record = {
        "settings": run.settings, "overrides": list(run.overrides), "ranks": run.ranks,
        "commit": commit, "code": None, "seconds": None, "said": "",
    }  # fmt: skip
    run.folder.mkdir(parents=True, exist_ok=True)
    common.write(note, run.folder / "run.json")
    log = run.folder / "log.txt"
    start = time.monotonic()
    with log.open("w") as out:
        done = subprocess.run(
            words or command(run), stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=False
        )
    note |= {"code": done.returncode, "seconds": time.monotonic() - start}
    said = log.read_text(errors="replace").strip().splitlines()
    if done.returncode == 0 and not metrics(run):
        note["code"] = 1  # it ended well, and yet has no last line
    if note["code"]:
        note["said"] = _reason(said)
    else:
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)  # gigabytes, of many runs
    common.write(note, run.folder / "run.json")
    return note


def _reason(said: list[str]) -> str:
    """The line that says most: the program's own, which its launcher's remarks come after."""
    own = [line for line in said if line.startswith("mpicdsgd:") or "Error" in line]
    return (own or said or ["it said nothing"])[-1].strip()[:300]


def find(name: str, folders: Sequence[Path]) -> Source | None:
    """The data set in the first of the folders that has it."""
    if name == "digits":
        return Source(name, "scikit-learn's digits", "")
    places, file = {
        "mnist": (("mnist", "."), "train-images-idx3-ubyte*"),
        "cifar10": (("cifar-10-batches-bin", "cifar10", "cifar-10-jpeg", "."),
                    "**/data_batch_1.bin"),
        "cifar100": (("cifar-100-binary", "cifar100", "."), "**/train.bin"),
    }[name]  # fmt: skip
    for folder in folders:
        for place in places:
            if found := next((folder / place).glob(file), None):
                path = str(found.resolve().parent)
                return Source(name, _title(name, path), path)
    return None


def _title(name: str, path: str) -> str:
    title = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[name]
    # Pixels that went through JPEG are not the original's, and only the folder tells.
    return f"{title} (JPEG)" if name == "cifar10" and "jpeg" in path.lower() else title

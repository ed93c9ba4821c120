"""A run taken from its folder again: config, graph, every agent's samples and objective. No ranks.

By the run's own functions, in one process for all agents. What can be checked is: a checkpoint's
matrix, parameters and steps in an epoch, and the first step's loss, made anew, beside the trace's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mpicdsgd.algorithms.config import mixes_by_matrix
from mpicdsgd.checkpoints.manifest import Manifest, Place
from mpicdsgd.common.errors import UserError
from mpicdsgd.common.files import reason
from mpicdsgd.data import Shuffler, load
from mpicdsgd.graphs.mixing_cycle import Mixing
from mpicdsgd.graphs.specs import graph_from_spec, mixing_from_spec
from mpicdsgd.models import build, losses
from mpicdsgd.runs import metrics_file, trace
from mpicdsgd.runs.config import Config, load_config
from mpicdsgd.runs.rng import seed_generators
from mpicdsgd.runs.trace import Trace
from mpicdsgd.theory.gradient_noise import has_dropout
from mpicdsgd.theory.objective import Floats, Objective, doubled, in_float64, place, point
from mpicdsgd.theory.rebuilt_checkpoints import Saved, check_same, intact, is_of, saved

_CONFIG = re.compile(r"config\.g(\d{4,9})\.toml")
_FIXED = ("run", "optim", "exchange")  # sections that say what the run was
_NEAR = 1e-2  # up to here a loss is the same one, on a GPU or in float32


@dataclass(frozen=True)
class Rebuilt:
    """See the module.

    Attributes:
        lines: of metrics.
        trace: its last part without a gap, or None, where ``no_trace`` says why.
        objectives: of all agents; they share a model.
        start: parameters before step 0.
        saved: of the intact checkpoints that belong to the run, newest first.
        batches: samples of an agent in each step of an epoch.
    """

    run_dir: Path
    generation: int
    config: Config
    mixing: Mixing
    lines: list[dict[str, Any]]
    trace: Trace | None
    no_trace: str
    objectives: tuple[Objective, ...]
    start: Floats
    saved: tuple[Saved, ...]
    batches: tuple[int, ...]

    @property
    def agents(self) -> int:
        """N."""
        return len(self.objectives)

    @property
    def model(self) -> nn.Module:
        """The agents' model, float64; whoever uses an objective writes its parameters."""
        return self.objectives[0].model


def rebuild(run_dir: Path, overrides: Sequence[str] = ()) -> Rebuilt:
    """Take up the run in ``run_dir``. Local; torch's and NumPy's global generators are seeded.

    Args:
        overrides: ``section.key=value`` for what has moved since, as in data.path.

    Raises:
        UserError: no run, an algorithm without a matrix, nothing evaluated or saved yet; config,
            trace, data or model cannot be read, or are not the run's.
    """
    generation, path = _newest_config(Path(run_dir))
    config = _config(path, overrides)
    lines = _metrics(Path(run_dir), generation)
    found = [(p, m) for p, m in intact(Path(run_dir)) if is_of(p, generation, config)]
    n = _agents(lines, found)
    if not n:
        raise UserError(f"{run_dir} has no evaluation and no checkpoint yet: wait for the first")
    mixing = mixing_from_spec(config.agents.mixing, graph_from_spec(config.agents.topology, n))
    shares = [load(config.data, config.run.seed, j, n) for j in range(n)]
    sizes, batch_size = shares[0].shares, config.data.batch_size
    shufflers = [
        Shuffler(sizes, j, batch_size, config.run.seed, config.data.drop_last) for j in range(n)
    ]
    models_N = [_initial(config, shares[j].input_shape, shares[j].classes, j) for j in
                (range(n) if config.agents.init == "local" else (0,))]  # fmt: skip
    model, loss_fn = in_float64(models_N[0]), losses.loss_function(config.model)
    objectives = tuple(
        Objective(model, loss_fn, share.train, config.optim.weight_decay, config.run.evaluate_batch)
        for share in shares
    )
    _check_float64(objectives[0])
    start = np.stack([point(in_float64(one)) for one in models_N])
    for where, manifest in found:
        check_same(where, manifest, models_N[0], mixing, n, shufflers[0].steps_per_epoch)
    part, why = _trace(Path(run_dir), generation, config)
    rebuilt = Rebuilt(
        Path(run_dir),
        generation,
        config,
        mixing,
        lines,
        part,
        why,
        objectives,
        np.broadcast_to(start, (n, start.shape[1])),
        tuple(
            one
            for where, manifest in found
            if (one := saved(where, manifest, models_N[0])) is not None
        ),
        tuple(len(b) for b in shufflers[0].batches(0)),
    )
    if part is not None and part.step[0] == 0 and not has_dropout(model):
        firsts = [next(iter(one.batches(0))) for one in shufflers]
        _check_first_loss(rebuilt, firsts, float(part.loss[0]))
    return rebuilt


def _newest_config(run_dir: Path) -> tuple[int, Path]:
    try:
        names = [p.name for p in run_dir.iterdir()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run_dir} cannot be read ({reason(error)}): give the folder of a run (run.dir)"
        ) from None
    found = {int(match[1]): run_dir / match[0] for n in names if (match := _CONFIG.fullmatch(n))}
    if not found:
        raise UserError(
            f"{run_dir} is not a run's folder, as it has no config.gNNNN.toml: "
            "give the folder of a run (run.dir)"
        )
    return max(found), found[max(found)]


def _config(path: Path, overrides: Sequence[str]) -> Config:
    for text in overrides:
        section = text.partition(".")[0].strip()
        if section in _FIXED:
            raise UserError(
                f"{text}: what the run did cannot be changed; only what has moved since: "
                "data.path, data.args, or a file of agents.topology and agents.mixing"
            )
    config = load_config(path, overrides)
    if not mixes_by_matrix(config.optim):
        raise UserError(
            f'optim.name = "{config.optim.name}" mixes by no matrix, which all of the theory is '
            "about: it speaks of runs with cdsgd"
        )
    return config


def _metrics(run_dir: Path, generation: int) -> list[dict[str, Any]]:
    path = metrics_file.files(run_dir).get(generation)
    return metrics_file.read(path) if path is not None else []


def _trace(run_dir: Path, generation: int, config: Config) -> tuple[Trace | None, str]:
    """The trace's last part without a gap."""
    if not config.run.theory:
        return None, "there is no trace: run with run.theory = true"
    if generation not in metrics_file.files(run_dir, "trace"):
        return None, "there is no trace yet"
    try:
        whole = trace.read(run_dir)
    except trace.NoStepsYet:
        return None, "no step is in the trace yet"
    begin = int(np.flatnonzero(np.diff(whole.step, prepend=-2) != 1)[-1])
    return Trace(**{name: values[begin:] for name, values in vars(whole).items()}), ""


def _agents(lines: list[dict[str, Any]], found: list[tuple[Place, Manifest]]) -> int:
    if found:
        return found[0][1].agents
    agents = lines[-1].get("train_loss", {}).get("agents") if lines else None
    return len(agents) if isinstance(agents, list) else 0


def _initial(config: Config, shape: tuple[int, ...], classes: int | None, rank: int) -> nn.Module:
    """The model as `runs.run.Run` makes it."""
    local = config.agents.init == "local"
    seed_generators(config.run.seed, rank + 1 if local else 0)
    return build.build(config.model, shape, classes)


def _check_float64(objective: Objective) -> None:
    few = replace(objective, only=np.arange(min(2, len(objective.samples))))
    try:
        few.value(point(objective.model))
    except RuntimeError as error:
        raise UserError(
            f"model or loss cannot be evaluated in float64 ({str(error).splitlines()[0]}): "
            "let them take the dtype of their inputs"
        ) from None


def _check_first_loss(rebuilt: Rebuilt, firsts: list[Any], recorded: float) -> None:
    """Raise a UserError unless step 0's loss is the trace's: data, model and seed are the run's."""
    total = 0.0
    for objective, indices, x in zip(rebuilt.objectives, firsts, rebuilt.start, strict=True):
        place(objective.model, x)
        objective.model.train()
        inputs, targets = doubled(*objective.samples.batch(indices))
        with torch.no_grad():
            total += float(objective.loss_fn(objective.model(inputs), targets))
        objective.model.eval()
    if abs(total - recorded) > _NEAR * max(abs(recorded), 1e-6):
        raise UserError(
            f"the loss of step 0, computed anew, is {total:.6g}, and the trace has {recorded:.6g}: "
            "data, model or code are not what they were in the run (data.path moved?)"
        )

"""The config of a run as a whole, and what a restart may find changed in it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpicdsgd.algorithms import config as settings
from mpicdsgd.algorithms.config import OptimConfig
from mpicdsgd.comm.agents import AgentsConfig
from mpicdsgd.comm.exchange.opening import ExchangeConfig
from mpicdsgd.common.errors import UserError
from mpicdsgd.data import DataConfig
from mpicdsgd.models.build import ModelConfig
from mpicdsgd.runs import toml_config


@dataclass(frozen=True)
class RunConfig:
    """Section ``[run]`` of a run's config."""

    dir: str = ""  # "": runs/<name of the config file>
    epochs: int = 10
    seed: int = 0
    evaluate_every: str = "1 epoch"  # or "50 steps", or "never": at the end only
    checkpoint_every: str = "1 epoch"
    evaluate_batch: int = 500  # samples at a time
    evaluate_train: bool = False  # on the agent's whole share, not the epoch's running mean
    resume: str = "auto"  # or "never": begin anew, as a new generation of the run
    keep: int = 3  # checkpoints, the newest
    keep_every: str = "never"  # or "10 epochs", "5000 steps": checkpoints of these steps stay too
    max_seconds: float = 0.0  # stop with a checkpoint before; 0: no limit
    tensorboard: bool = False
    theory: bool = False  # record what the theory speaks of, at every step: see `trace`


@dataclass(frozen=True)
class ResumeConfig:
    """Section ``[resume]`` of a run's config: what a restart may change."""

    elastic: bool = False  # the number of agents and the batch size, too: see `elastic`


@dataclass(frozen=True)
class Config:
    """A run's whole config."""

    run: RunConfig = field(default_factory=RunConfig)
    agents: AgentsConfig = field(default_factory=AgentsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read ``path``, apply ``section.key=value`` overrides, fill in defaults. Local.

    Raises:
        UserError: see `mpicdsgd.runs.toml_config` and `settings.completed`.
    """
    tables = toml_config.read_toml(path)
    toml_config.override(tables, overrides)
    config = toml_config.fill(Config, tables)
    on_command_line: dict[str, Any] = {}
    toml_config.override(on_command_line, overrides)
    optim = settings.completed(
        config.optim, tables.get("optim", {}), on_command_line.get("optim", {})
    )
    config = dataclasses.replace(config, optim=optim)
    if config.agents.on_death == "continue":
        config = _implied(config)
    if not config.run.dir:
        run = dataclasses.replace(config.run, dir=str(Path("runs") / path.stem))
        config = dataclasses.replace(config, run=run)
    return config


def _implied(config: Config) -> Config:
    """What `survival` needs: checkpoints of fewer agents go on, nobody holds another's memory."""
    exchange = config.exchange
    if exchange.transport == "auto":
        exchange = dataclasses.replace(exchange, transport="neighbor")
    return dataclasses.replace(config, exchange=exchange, resume=ResumeConfig(elastic=True))


def _check_survival(config: Config) -> None:
    """Raise a UserError for what cannot go on without one of its ranks. Local."""
    if config.agents.on_death not in ("end", "continue"):
        raise UserError(
            f'agents.on_death must be "end" or "continue", got "{config.agents.on_death}"'
        )
    if config.agents.on_death == "end":
        return
    if not settings.mixes_by_matrix(config.optim):
        raise UserError(
            'agents.on_death = "continue" is for algorithms that mix by a matrix '
            f"({', '.join(settings.BY_MATRIX)} and any torch optimizer), not optim.name = "
            f'"{config.optim.name}": leave it at "end"'
        )
    if config.exchange.transport not in ("auto", "neighbor"):
        raise UserError(
            f'agents.on_death = "continue" needs exchange.transport = "neighbor", got '
            f'"{config.exchange.transport}": the memory that others read dies with its rank'
        )
    if config.run.theory:
        raise UserError(
            'agents.on_death = "continue": run.theory = true records a run of one matrix: set one '
            "of the two otherwise"
        )


def check(config: Config) -> None:
    """Raise a UserError for a value out of range that no other part of the run looks at. Local."""
    if config.agents.init not in ("broadcast", "local"):
        raise UserError(f'agents.init must be "broadcast" or "local", got "{config.agents.init}"')
    if config.run.resume not in ("auto", "never"):
        raise UserError(f'run.resume must be "auto" or "never", got "{config.run.resume}"')
    for name in ("epochs", "keep", "evaluate_batch"):
        if getattr(config.run, name) < 1:
            raise UserError(f"run.{name} must be at least 1, got {getattr(config.run, name)}")
    if not (config.run.max_seconds >= 0 and math.isfinite(config.run.max_seconds)):
        raise UserError(
            f"run.max_seconds must be a finite number >= 0 (0: no limit), "
            f"got {config.run.max_seconds}"
        )
    settings.check(config.optim)
    _check_survival(config)
    if config.run.theory and not settings.mixes_by_matrix(config.optim):
        raise UserError(
            "run.theory = true is for algorithms that mix by a matrix "
            f"({', '.join(settings.BY_MATRIX)} "
            f'and any torch optimizer), not optim.name = "{config.optim.name}": leave it out'
        )
    if config.agents.threads < 0:
        raise UserError(
            f"agents.threads must be at least 0 (0: this node's cores shared out), "
            f"got {config.agents.threads}"
        )
    if not (config.optim.clip_norm >= 0 and math.isfinite(config.optim.clip_norm)):
        raise UserError(
            f"optim.clip_norm must be a finite number >= 0 (0: do not clip), "
            f"got {config.optim.clip_norm}"
        )


def every(name: str, text: str, steps_per_epoch: int) -> int:
    """``"2 epochs"`` or ``"50 steps"`` in steps; 0 for ``"never"``."""
    if text == "never":
        return 0
    found = re.fullmatch(r"([1-9][0-9]{0,8}) *(epoch|step)s?", text.strip())
    if found is None:
        raise UserError(f'run.{name} must be like "1 epoch", "50 steps" or "never", got "{text}"')
    return int(found[1]) * (steps_per_epoch if found[2] == "epoch" else 1)


def as_json(value: Any) -> Any:
    """``value`` as JSON would give it back."""
    return json.loads(json.dumps(value))


def differences(then: Any, now: Any, where: str = "") -> list[str]:
    """Keys in which two configs differ, with both values; what a restart may change is left out.

    A key that ``then`` lacks, as there was none, had what is now its default.
    """
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [k for k in now if f"{where}{k}" not in MAY_CHANGE]
        then = {k: _default(f"{where}{k}") for k in keys} | then
        return [d for k in keys for d in differences(then[k], now[k], f"{where}{k}.")]
    if as_json(then) == as_json(now):
        return []
    return [f"{where[:-1]} = {now!r} (was {then!r})"]


def _default(key: str) -> Any:
    """Of ``section`` or ``section.key``; None where there is no such."""
    found: Any = dataclasses.asdict(Config())
    for name in key.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


MAY_CHANGE = (
    "run.dir", "run.resume", "run.keep", "run.keep_every", "run.epochs", "run.max_seconds",
    "run.tensorboard", "run.theory", "agents.on_death", "data.path", "resume",
)  # fmt: skip

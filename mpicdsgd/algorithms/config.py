"""Section ``[optim]`` of a config: its keys, which algorithm has which, and what is refused."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from mpicdsgd.common.errors import UserError
from mpicdsgd.common.text import printable

BY_MATRIX = ("cdsgd", "cdmsgd", "icdsgd")
_GOSSIP = ("gossip", "gosgd")
_ELASTIC = ("easgd", "eamsgd")
NAMES = (*BY_MATRIX, "sgd", "msgd", "fedavg", *_ELASTIC, "downpour", *_GOSSIP)
_ONLY_OF = {  # settings that only these algorithms have
    "rounds": BY_MATRIX,
    "local_epochs": ("fedavg",),
    "fraction": ("fedavg",),
    "server_momentum": ("fedavg",),
    "period": _ELASTIC,
    "elasticity": _ELASTIC,
    "asynchronous": _ELASTIC,
    "n_push": ("downpour",),
    "n_fetch": ("downpour",),
    "adagrad": ("downpour",),
    "probability": _GOSSIP,
}
# A file may have these for whatever algorithm the command line names: they are refused there only.
_MOMENTUM_OF = {"momentum": ("cdmsgd", "msgd", "eamsgd"), "nesterov": ("cdmsgd", "msgd")}
_OWN_DEFAULTS: dict[str, dict[str, Any]] = {"icdsgd": {"rounds": 2}}


@dataclass(frozen=True)
class OptimConfig:
    """Section ``[optim]`` of a run's config."""

    name: str = "cdmsgd"  # see NAMES, or any torch optimizer as "torch.optim:AdamW"
    lr: float = 0.01
    momentum: float = 0.95
    nesterov: bool | str = True  # false: Polyak; "look-ahead"
    weight_decay: float = 0.0
    rounds: int = 1  # cdsgd, cdmsgd, icdsgd (2): mixing rounds per step, tau
    local_epochs: int = 1  # fedavg: E
    fraction: float = 1.0  # fedavg: C, of the agents that take part in a round
    server_momentum: float = 0.0  # fedavg
    period: int = 4  # easgd, eamsgd: steps between two pulls, tau
    elasticity: float = 0.0  # easgd, eamsgd: e = alpha rho; 0: 0.9 / agents
    asynchronous: bool = False  # easgd, eamsgd: by a server, which is the last rank
    n_push: int = 1  # downpour: steps between two pushes to the server, which is the last rank
    n_fetch: int = 1  # downpour
    adagrad: bool = False  # downpour: the server's step
    probability: float = 0.5  # gossip, gosgd: p, to meet or push after a step
    schedule: str = "fixed"  # or a torch scheduler as "torch.optim.lr_scheduler:StepLR"
    args: dict[str, Any] = field(default_factory=dict)  # of a torch optimizer
    schedule_args: dict[str, Any] = field(default_factory=dict)  # of a torch scheduler
    clip_norm: float = 0.0  # clip the gradient's norm to this; 0: do not
    debug: bool = False  # find parameters changed through .data, at the cost of a checksum


def needs_server(config: OptimConfig) -> bool:
    """Whether the algorithm needs a rank for a server beside the agents. Local."""
    return config.name == "downpour" or (config.name in _ELASTIC and config.asynchronous)


def keeps_count(config: OptimConfig) -> bool:
    """Whether agents or server count what was sent, so that their number must not change. Local."""
    return needs_server(config) or config.name == "gosgd"


def mixes_by_matrix(config: OptimConfig) -> bool:
    """Whether the algorithm uses the mixing matrix. Local."""
    return config.name in BY_MATRIX or ":" in config.name


def descends(config: OptimConfig) -> bool:
    """Whether a step is one of gradient descent on V, arXiv 1706.07880 eq. (7). Local."""
    return config.name in ("cdsgd", "icdsgd")


def uses_graph(config: OptimConfig) -> bool:
    """Whether the algorithm uses the graph's edges. Local."""
    return mixes_by_matrix(config) or config.name in _GOSSIP


def completed(
    config: OptimConfig, given: Collection[str], on_command_line: Collection[str]
) -> OptimConfig:
    """``config`` with the algorithm's own defaults for what was not given. Local.

    Args:
        given: all keys that were, wherever.
        on_command_line: those of them that are refused where the algorithm has no such setting,
            also at their default. A file's are not: a resolved config has all keys.

    Raises:
        UserError: see ``on_command_line``.
    """
    if config.name in NAMES or ":" in config.name:
        for key, names in (_ONLY_OF | _MOMENTUM_OF).items():
            if key in on_command_line:
                _require(config, key, names)
    own = _OWN_DEFAULTS.get(config.name, {})
    return dataclasses.replace(config, **{k: v for k, v in own.items() if k not in given})


def check(config: OptimConfig) -> None:
    """Raise a UserError for an unknown algorithm and for what no optimizer looks at. Local."""
    is_torch = ":" in config.name
    if not is_torch and config.name not in NAMES:
        near = difflib.get_close_matches(config.name, NAMES, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f'unknown optim.name "{printable(config.name)}": {hint}known are {", ".join(NAMES)} '
            'and any torch optimizer as "torch.optim:AdamW"'
        )
    defaults = OptimConfig()
    for key, names in _ONLY_OF.items():
        if getattr(config, key) != getattr(defaults, key):
            _require(config, key, names)
    if config.args and not is_torch:
        raise UserError(
            f'optim.args is for torch optimizers ("torch.optim:AdamW"), not {config.name}'
        )
    if config.local_epochs < 1:
        raise UserError(f"optim.local_epochs (E) must be at least 1, got {config.local_epochs}")
    if config.name in _ELASTIC and not 0 <= config.elasticity < 1:
        raise UserError(
            f"optim.elasticity (e) must be in (0, 1), or 0 for 0.9 / agents, "
            f"got {config.elasticity}"
        )


def _require(config: OptimConfig, key: str, names: tuple[str, ...]) -> None:
    if config.name not in names:
        *most, last = names
        all_of_them = f"{', '.join(most)} and {last}" if most else last
        raise UserError(
            f"optim.{key} = {json.dumps(getattr(config, key))} is for {all_of_them} only, "
            f"not {printable(config.name)}: leave it out"
        )

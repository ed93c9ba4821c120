"""Section ``[optim]`` of a config: its keys come from the algorithms' settings."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mpicdsgd.algorithms import registry
from mpicdsgd.algorithms.contract import GRAPH, Algorithm
from mpicdsgd.common.errors import UserError
from mpicdsgd.common.text import printable

# A file may have these for whatever algorithm the command line names: they are refused there only.
_TOLERATED = ("momentum", "nesterov")


@dataclass(frozen=True)
class CommonConfig:
    """What ``[optim]`` has for every algorithm; `OptimConfig` adds the algorithms' own settings."""

    name: str = "cdmsgd"  # see `registry`, a torch optimizer as "torch.optim:AdamW", or one's own
    lr: float = 0.01
    weight_decay: float = 0.0
    schedule: str = "fixed"  # or a torch scheduler as "torch.optim.lr_scheduler:StepLR"
    args: dict[str, Any] = field(default_factory=dict)  # of a torch optimizer, or of one's own
    schedule_args: dict[str, Any] = field(default_factory=dict)  # of a torch scheduler
    clip_norm: float = 0.0  # clip the gradient's norm to this; 0: do not
    debug: bool = False  # find parameters changed through .data, at the cost of a checksum


def _own_settings() -> dict[str, tuple[Any, Any]]:
    """Types and defaults of the algorithms' settings by key; the first one's default holds."""
    found: dict[str, tuple[Any, Any]] = {}
    common = {f.name for f in dataclasses.fields(CommonConfig)}
    for kind in registry.algorithms().values():
        for each in dataclasses.fields(kind.Settings):
            if each.name not in common:
                found.setdefault(each.name, (_plain_type(each.default), each.default))
    return found


def _plain_type(default: Any) -> Any:
    # Of all settings only nesterov is of two kinds: true, false or "look-ahead".
    return bool | str if default is True else type(default)


_OWN = _own_settings()
if TYPE_CHECKING:

    class OptimConfig(CommonConfig):
        """Section ``[optim]`` of a run's config."""

else:
    OptimConfig = dataclasses.make_dataclass(
        "OptimConfig",
        [(name, kind, field(default=default)) for name, (kind, default) in _OWN.items()],
        bases=(CommonConfig,),
        frozen=True,
    )
    OptimConfig.__module__ = __name__

NAMES = tuple(registry.algorithms())
BY_MATRIX = tuple(name for name, kind in registry.algorithms().items() if kind.over == GRAPH)


def is_torch(config: OptimConfig) -> bool:
    """Whether ``optim.name`` is a torch optimizer, which is mixed after its step. Local."""
    return registry.find(config.name) is None


def kind_of(config: OptimConfig) -> type[Algorithm]:
    """The algorithm that a run makes its steps by, in the variant that its settings ask for."""
    kind = registry.find(config.name) or registry.algorithms()["cdsgd"]
    return kind.of(settings_of(config))


def settings_of(config: OptimConfig) -> Any:
    """The algorithm's settings; for one of the user's own ``optim.args`` has those of its own.

    Raises:
        UserError: for ``optim.args`` that it does not have.
    """
    kind = registry.find(config.name)
    if kind is None:
        kind = registry.algorithms()["cdsgd"]
        return kind.Settings(lr=config.lr)
    names = registry.setting_names(kind)
    values = {name: getattr(config, name) for name in names if hasattr(config, name)}
    if ":" in config.name:  # whatever it calls itself
        _check_own(config, kind)
        values |= config.args
    return kind.Settings(**values)


def _check_own(config: OptimConfig, kind: type[Algorithm]) -> None:
    """Raise a UserError for settings of a user's own that clash, and for ``optim.args``."""
    fields = {f.name: f for f in dataclasses.fields(kind.Settings)}
    outside = ("lr", "weight_decay")
    for name in (f.name for f in dataclasses.fields(CommonConfig)):
        if name in fields and name not in outside:
            raise UserError(
                f"optim.name = {config.name}: its setting {name} has the name of a key that "
                "[optim] has for every algorithm; call it otherwise"
            )
    for key, value in config.args.items():
        if key not in fields or key in outside:
            raise UserError(
                f"optim.args.{key}: {config.name} has the settings {', '.join(fields)}; "
                "optim.lr and optim.weight_decay are set outside optim.args"
            )
        default = fields[key].default
        wanted = (int, float) if type(default) is float else (type(default),)
        if type(default) in (bool, int, float, str) and type(value) not in wanted:
            raise UserError(
                f"optim.args.{key}: {config.name} takes one like {json.dumps(default)}, "
                f"got {json.dumps(value)}"
            )


def rounds_of(config: OptimConfig) -> int:
    """Mixing rounds of a step, tau. Local."""
    return int(getattr(settings_of(config), "rounds", 1))


def needs_server(config: OptimConfig) -> bool:
    """Whether the algorithm needs a rank for a server beside the agents. Local."""
    return registry.needs_server(kind_of(config))


def keeps_count(config: OptimConfig) -> bool:
    """Whether agents or server count what was sent, so that their number must not change. Local."""
    return kind_of(config).counts


def mixes_by_matrix(config: OptimConfig) -> bool:
    """Whether the algorithm uses the mixing matrix. Local."""
    return kind_of(config).over == GRAPH


def descends(config: OptimConfig) -> bool:
    """Whether a step is one of gradient descent on V, arXiv 1706.07880 eq. (7). Local."""
    return kind_of(config).descends and not is_torch(config)


def uses_graph(config: OptimConfig) -> bool:
    """Whether the algorithm uses the graph's edges. Local."""
    return registry.uses_edges(kind_of(config))


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
    if config.name not in NAMES and ":" not in config.name:
        return config  # `check` says so
    for key in _OWN:
        if key in on_command_line:
            _require(config, key)
    kind = registry.find(config.name)
    fields = {} if kind is None else {f.name: f.default for f in dataclasses.fields(kind.Settings)}
    own: dict[str, Any] = {k: v for k, v in fields.items() if k in _OWN and k not in given}
    return dataclasses.replace(config, **own)


def check(config: OptimConfig) -> None:
    """Raise a UserError for an unknown algorithm and for settings it lacks or refuses. Local."""
    if ":" not in config.name and config.name not in NAMES:
        near = difflib.get_close_matches(config.name, NAMES, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f'unknown optim.name "{printable(config.name)}": {hint}known are {", ".join(NAMES)} '
            'and any torch optimizer as "torch.optim:AdamW"'
        )
    for key, (_, default) in _OWN.items():
        if key not in _TOLERATED and getattr(config, key) != default:
            _require(config, key)
    if config.args and ":" not in config.name:
        raise UserError(
            f'optim.args is for torch optimizers ("torch.optim:AdamW"), not {config.name}'
        )
    if not is_torch(config):
        settings = settings_of(config)
        try:
            settings.check()
        except UserError as error:  # every setting's message begins with its name
            raise UserError(f"optim.{error}") from None


def _require(config: OptimConfig, key: str) -> None:
    """Raise a UserError unless the algorithm has the setting ``key``."""
    kind = registry.find(config.name)
    if kind is not None and key in registry.setting_names(kind) and not _is_fixed(kind, key):
        return
    names = [
        name
        for name, other in registry.algorithms().items()
        if key in registry.setting_names(other) and not _is_fixed(other, key)
    ]
    *most, last = names
    all_of_them = f"{', '.join(most)} and {last}" if most else last
    raise UserError(
        f"optim.{key} = {json.dumps(getattr(config, key))} is for {all_of_them} only, "
        f"not {printable(config.name)}: leave it out"
    )


def _is_fixed(kind: type[Algorithm], key: str) -> bool:
    """Whether the setting is the local step's, but the algorithm has it in one way only."""
    return key in kind.fixed

"""The one list of algorithms, by the name that a config gives them.

All that depends on an algorithm asks here: the keys of ``[optim]`` and their refusals, the
documentation's table, the simulator, the theory, ``mpicdsgd info``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from mpicdsgd.algorithms.contract import GRAPH, MAIL, PAIRS, SERVER, Algorithm
from mpicdsgd.common import plugins
from mpicdsgd.common.errors import UserError

# Where the project's own are; in the order of the documentation's table.
MODULES = (
    "cdsgd", "cdmsgd", "gradient_tracking", "push_sum", "sgd", "fedavg", "easgd", "easgd_served",
    "downpour", "gossip", "gosgd",
)  # fmt: skip
_known: dict[str, type[Algorithm]] = {}

K = TypeVar("K", bound=type[Algorithm])


def algorithm(name: str, title: str, *, source: str) -> Callable[[K], K]:
    """Register a class under ``name``.

    Args:
        title: what it is, in a few words.
        source: paper and equation.
    """

    def register(kind: K) -> K:
        kind.name, kind.title, kind.source = name, title, source
        if kind.__module__.startswith(f"{__package__}."):  # a user's goes by module and name
            assert name not in _known, f"two algorithms are called {name}"
            _known[name] = kind
        return kind

    return register


@functools.cache
def algorithms() -> dict[str, type[Algorithm]]:
    """The project's own, by name. Local."""
    modules = [importlib.import_module(f"{__package__}.{name}").__name__ for name in MODULES]
    return {
        name: kind
        for module in modules
        for name, kind in _known.items()
        if kind.__module__ == module
    }


def find(name: str) -> type[Algorithm] | None:
    """The algorithm that ``optim.name`` names, also one of a user's own. Local.

    None: a torch optimizer, or no such name, which `config.check` refuses.

    Raises:
        UserError: ``package.module:Name`` that cannot be found, or has no settings.
    """
    if ":" not in name:
        return algorithms().get(name)
    if name.startswith("torch."):  # which takes seconds to import
        return None
    kind: Any = plugins.load_function(name, "optim.name")
    if not (isinstance(kind, type) and issubclass(kind, Algorithm)):
        return None
    if not dataclasses.is_dataclass(getattr(kind, "Settings", None)):
        raise UserError(
            f'optim.name = "{name}" has no dataclass Settings, as local_steps.Plain is one'
        )
    return kind


def setting_names(kind: type[Algorithm]) -> tuple[str, ...]:
    """The keys of ``[optim]`` that an algorithm has."""
    return tuple(field.name for field in dataclasses.fields(kind.Settings))


def uses_edges(kind: type[Algorithm]) -> bool:
    """Whether anything goes along the graph's edges."""
    return kind.over in (GRAPH, PAIRS, MAIL)


def needs_server(kind: type[Algorithm]) -> bool:
    """Whether a rank is needed for a server beside the agents."""
    return kind.over == SERVER

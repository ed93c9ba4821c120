"""Objects of the user's own, named as ``"package.module:name"`` in a config."""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, signature
from typing import Any

from mpicdsgd.common.errors import UserError


def load_function(spec: str, key: str) -> Callable[..., Any]:
    """Import ``module`` of ``"module:name"`` and return its callable ``name``.

    The current directory is searched first, as ``python -m`` does. What the module itself raises
    while it is imported goes through unchanged: it is the user's code, and its traceback helps.

    Args:
        spec: for instance ``"mypackage.models:small"``; ``name`` may be dotted.
        key: the config key that ``spec`` stands in, for the messages.

    Raises:
        UserError: bad form, no such module (or one that it needs), no such name, not callable.
    """
    module_name, colon, name = spec.partition(":")
    parts = module_name.split(".") + name.split(".")
    if not colon or not all(part.isidentifier() for part in parts):
        raise UserError(f'{key} = "{spec}" is not of the form "package.module:function"')
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as err:
        missing = err.name or "?"
        if module_name == missing or module_name.startswith(missing + "."):
            raise UserError(
                f'{key} = "{spec}": no module {missing} in {here} or among the installed ones'
            ) from err
        raise UserError(
            f'{key} = "{spec}": {module_name} imports {missing}, which is not installed'
        ) from err
    for depth, part in enumerate(name.split(".")):
        if not hasattr(found, part):
            inside = ":".join([module_name, ".".join(name.split(".")[:depth])]).rstrip(":")
            near = nearest(part, [n for n in dir(found) if not n.startswith("_")])
            raise UserError(f'{key} = "{spec}": {inside} has no {part}{near}')
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f'{key} = "{spec}" is a {type(found).__name__}, which cannot be called')
    return found  # type: ignore[no-any-return]


def nearest(given: str, known: Iterable[str]) -> str:
    """Return ``": did you mean x?"`` for the known name most like ``given``, or nothing."""
    close = difflib.get_close_matches(given, list(known), n=1)
    return f": did you mean {close[0]}?" if close else ""


def check_arguments(
    function: Callable[..., Any],
    args: Mapping[str, Any],
    key: str,
    *,
    given: int = 0,
    optional: tuple[str, ...] = (),
) -> None:
    """Raise UserError where ``function(*given, **args)`` would not fit its signature.

    Args:
        function: what is to be called; one without a readable signature is let through.
        args: keyword arguments from the config.
        key: the config key that they stand in, for the messages.
        given: so many leading parameters are given by the caller ...
        optional: ... of which these may stand in ``args`` instead.
    """
    try:
        parameters = list(signature(function).parameters.values())
    except (TypeError, ValueError):
        return
    leading, rest = parameters[:given], parameters[given:]
    named = [p for p in rest if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)]
    allowed = [p.name for p in leading if p.name in optional] + [p.name for p in named]
    takes = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
    open_ended = any(p.kind is Parameter.VAR_KEYWORD for p in rest)
    name = getattr(function, "__name__", "the function")
    for arg in args:
        if arg not in allowed and not open_ended:
            raise UserError(f"{key}: {name} has no argument {arg}{nearest(arg, allowed)}; {takes}")
    missing = [p.name for p in named if p.default is Parameter.empty and p.name not in args]
    if missing:
        raise UserError(f"{key}: {name} also needs {', '.join(missing)}; {takes}")

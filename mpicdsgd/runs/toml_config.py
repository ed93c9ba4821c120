"""Reading a run's TOML file into frozen dataclasses.

The dataclasses stand beside the code that they configure; here is only how they are filled: by
field name, with every type checked, an unknown key an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from mpicdsgd.common.errors import UserError
from mpicdsgd.common.files import reason
from mpicdsgd.common.text import printable

T = TypeVar("T")

_DEPTH = 20  # of lists and tables within a value


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables.

    Raises:
        UserError: if it cannot be read or is not TOML.
    """
    shown = printable(str(path))
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise UserError(f"cannot read the config {shown}: {reason(error)}") from None
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # not only TOMLDecodeError: 5,000 digits, say
        raise UserError(f"{shown} is not valid TOML: {reason(error)}") from None


def override(tables: dict[str, Any], assignments: Sequence[str]) -> None:
    """Apply ``section.key=value`` strings to ``tables``, in place.

    A value is read as TOML where it can be (``0.02``, ``true``, ``[1, 2]``, ``"quoted"``), else it
    is a string as it stands.

    Raises:
        UserError: for a string without ``=`` or without a section.
    """
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        *path, key = name.strip().split(".")
        if not equals or not path or not all([*path, key]):
            raise UserError(
                f'"{printable(assignment)}" is not of the form section.key=value, '
                "as in optim.lr=0.02"
            )
        table = tables
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                shown = printable(assignment)
                raise UserError(f'"{shown}": {printable(part)} is a value and has no keys')
        table[key] = _value(text)


def fill(cls: type[T], tables: Mapping[str, Any], where: str = "") -> T:
    """An instance of the dataclass ``cls`` from ``tables``; missing keys keep their defaults.

    Raises:
        UserError: for an unknown key (naming the nearest one) or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in tables.items():
        full = f"{where}{key}"
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
            hint = f"did you mean {where}{near[0]}?" if near else f"known are {', '.join(names)}"
            raise UserError(f"unknown config key {printable(full)}: {hint}")
        hint_type = hints[key]
        if dataclasses.is_dataclass(hint_type):
            if not isinstance(value, dict):
                raise UserError(f"config key {full} must be a section, got {_brief(value)}")
            values[key] = fill(typing.cast(type[Any], hint_type), value, f"{full}.")
        else:
            values[key] = _typed(full, value, hint_type)
    return cls(**values)


def write_toml(config: Any, path: Path, header: Mapping[str, Any]) -> None:
    """Write a filled config to ``path``, with ``header`` as comment lines at its top."""
    lines = [f"# {key}: {' '.join(str(value).split())}\n" for key, value in header.items()]
    text = "".join(lines) + "\n" + tomli_w.dumps(dataclasses.asdict(config))
    path.write_text(text, encoding="utf-8")


def _value(text: str) -> Any:
    try:
        tables = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text.strip()
    return tables["value"] if len(tables) == 1 else text.strip()


def _typed(name: str, value: Any, hint: Any) -> Any:
    _check_plain(name, value)
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in allowed:
        origin = typing.get_origin(kind) or kind
        if origin is float and type(value) in (int, float):
            return float(value)
        if type(value) is origin:
            return value
        if origin is str and type(value) in (int, float) and len(allowed) == 1:
            return str(value)  # `run.dir=2026` on a command line is meant as a name
    words = {str: "a string", int: "an integer", float: "a number", bool: "true or false",
             dict: "a table", list: "a list"}  # fmt: skip
    wanted = " or ".join(words.get(typing.get_origin(k) or k, str(k)) for k in allowed)
    raise UserError(f"config key {name} must be {wanted}, got {_brief(value)}")


def _check_plain(name: str, value: Any, depth: int = 0) -> None:
    """Raise a UserError unless ``value`` can be kept as JSON: no dates, no numbers without end."""
    if depth > _DEPTH:
        raise UserError(f"config key {printable(name)[:80]} is nested deeper than {_DEPTH} levels")
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_plain(f"{name}.{key}", inner, depth + 1)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _check_plain(f"{name}[{i}]", inner, depth + 1)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"config key {printable(name)}: integers have at most 64 bits, as in TOML")
    elif not isinstance(value, str | int | float):
        raise UserError(f"config key {printable(name)} must not be a date or time: quote it")


def _brief(value: Any) -> str:
    try:
        return printable(repr(value))[:80]
    except (RecursionError, ValueError):  # nested too deep; an integer of thousands of digits
        return f"a {type(value).__name__} too large to be shown"

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

from mpicdsgd.errors import UserError

T = TypeVar("T")


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables.

    Raises:
        UserError: if it cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {' '.join(str(error).split())}") from None


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
                f'"{assignment}" is not of the form section.key=value, as in optim.lr=0.02'
            )
        table = tables
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise UserError(f'"{assignment}": {part} is a value and has no keys')
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
            raise UserError(f"unknown config key {full}: {hint}")
        hint_type = hints[key]
        if dataclasses.is_dataclass(hint_type):
            if not isinstance(value, dict):
                raise UserError(f"config key {full} must be a section, got {value!r}")
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
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text.strip()


def _typed(name: str, value: Any, hint: Any) -> Any:
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
    raise UserError(f"config key {name} must be {wanted}, got {value!r}")

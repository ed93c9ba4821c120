"""The documentation's tables of algorithms, made from what their classes declare.

python -m mpicdsgd.algorithms.table                       prints them
python -m mpicdsgd.algorithms.table docs/algorithms.md    writes them into the page
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from mpicdsgd.algorithms import registry
from mpicdsgd.algorithms.contract import COLUMN, GRAPH, KINDS, Algorithm, Circumstances

BEGIN = "<!-- From the code: python -m mpicdsgd.algorithms.table docs/algorithms.md -->"
END = "<!-- Up to here. -->"
_COMMON = ("lr", "weight_decay")  # which all have


def titles() -> dict[str, str]:
    """What each algorithm is, by its name."""
    return {name: kind.title for name, kind in registry.algorithms().items()}


def tables() -> str:
    """All algorithms, and all settings, as Markdown."""
    head = ("`optim.name`", "what it is", "graphs and matrices", "order of a step",
            "state beside x", "simulated", "source")  # fmt: skip
    rows = [
        (
            f"`{name}`",
            kind.title,
            _graphs(kind),
            kind.order,
            ", ".join(_state(kind)) or "nothing",
            "yes" if kind.synchronous else "no",
            kind.source,
        )
        for name, kind in registry.algorithms().items()
    ]
    over = [
        (what, ", ".join(f"`{n}`" for n, k in registry.algorithms().items() if k.over == key))
        for key, what in KINDS.items()
    ]
    parts = [
        _table(head, rows),
        _table(("what an algorithm communicates over", ""), over),
        _table(("setting (default)", "of", ""), settings()),
    ]
    return "\n\n".join(parts)


def written(page: str) -> str:
    """``page`` with the tables of now between the two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"no {BEGIN} and {END} in the page"
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def _graphs(kind: type[Algorithm]) -> str:
    admits = kind.admits
    if admits is None:
        return "uses none"
    graph = "any" if admits.directed else "undirected"
    if kind.over != GRAPH:
        return f"{graph}; no matrix"
    which = "column-stochastic, too" if admits.matrix == COLUMN else admits.matrix
    return f"{graph}; {which}; {'cycles, too' if admits.changing else 'one that stays'}"


def _state(kind: type[Algorithm]) -> list[str]:
    """Vectors and numbers that an agent keeps, with default settings."""
    settings = kind.Settings()
    made = kind.of(settings)(settings, Circumstances())
    momentum = ["v"] if settings.has_momentum else []
    return [*momentum, *made.vectors, *(f"{name} (a number)" for name in made.numbers)]


def settings() -> list[tuple[str, str, str]]:
    """Key and defaults, which algorithms have it, and what it is, of each setting."""
    found: dict[str, dict[str, dataclasses.Field[object]]] = {}
    for name, kind in registry.algorithms().items():
        for field in dataclasses.fields(kind.Settings):
            if field.name not in kind.fixed:
                found.setdefault(field.name, {})[name] = field
    rows = []
    for key, fields in found.items():
        first = next(iter(fields.values()))
        others = {n: f.default for n, f in fields.items() if f.default != first.default}
        more = "".join(f"; {name}: {json.dumps(value)}" for name, value in others.items())
        of = "all" if key in _COMMON else ", ".join(fields)
        rows.append((f"`{key}` ({json.dumps(first.default)}{more})", of, first.metadata["help"]))
    return rows


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(arguments: list[str]) -> None:
    if not arguments:
        print(tables())
    for name in arguments:
        path = Path(name)
        path.write_text(written(path.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Runs beside the theory: the paper's bounds, estimated constants, verdicts.

May import all but the command line. Begin with `formulas` (the bounds, in NumPy), whose names are
also this package's own, then `report` (``mpicdsgd theory``) and `case`.
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    formulas = importlib.import_module("mpicdsgd.theory.formulas")
    try:
        return getattr(formulas, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None

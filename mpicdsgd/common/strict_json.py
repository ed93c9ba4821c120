"""JSON as the files of a run have it: no NaN, no infinity; what cannot be said is null."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np


def strict(value: Any) -> Any:
    """``value`` as strict JSON allows it: NaN and infinities as "NaN", "Infinity", "-Infinity".

    JSON has no such numbers, and ``null`` would not say which it was. NumPy scalars and arrays
    become numbers and lists, tuples lists, paths strings.
    """
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return strict(value.tolist())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


NUMBERS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def numbers(value: Any) -> Any:
    """A line's NaN and infinities as numbers again."""
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numbers(item) for item in value]
    return NUMBERS.get(value, value) if isinstance(value, str) else value

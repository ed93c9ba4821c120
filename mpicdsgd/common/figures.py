"""What all plots share: colours, suffixes, writing. Matplotlib is not imported here."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from mpicdsgd.common.errors import UserError
from mpicdsgd.common.files import reason

SUFFIXES = (".png", ".pdf", ".svg")
# Okabe and Ito's colours: told apart by all kinds of colour vision, and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK = "#333333"


def check_suffix(out: Path) -> None:
    """Raise a UserError unless ``out`` ends in a suffix that can be written."""
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"plot {out} has the suffix {out.suffix or '(none)'!r}: use {', '.join(SUFFIXES)}"
        )


def save(figure: Any, out: Path) -> None:
    """Write a Matplotlib Figure, whole or not at all; a missing folder is made.

    Raises:
        UserError: it cannot be written.
    """
    temporary = out.with_name(f".{out.stem}.{os.getpid()}{out.suffix.lower()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, dpi=160)
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"plot {out} cannot be written: {reason(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()

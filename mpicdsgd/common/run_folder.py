"""What lies in a run's folder and who holds it: its claim file and its newest generation."""

from __future__ import annotations

import os
import re
from pathlib import Path

_CLAIM = re.compile(r"generation-(\d{4,9})")


_OWNED = re.compile(r"(?:config|metrics|trace)\.g(\d{4,9})\.(?:toml|jsonl)")


def claim_file(run_dir: Path, generation: int) -> Path:
    """The file whose creation claims ``generation``: see `runs.owner`."""
    return run_dir / f"generation-{generation:04d}"


def newest_generation(run_dir: Path) -> int:
    """The highest generation that left a trace in the run's folder, 0 if none did.

    Raises:
        OSError: the folder cannot be listed.
    """
    matches = (_CLAIM.fullmatch(name) or _OWNED.fullmatch(name) for name in os.listdir(run_dir))
    return max((int(match[1]) for match in matches if match), default=0)

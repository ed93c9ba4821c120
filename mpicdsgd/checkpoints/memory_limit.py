"""How much memory this process may still take, before the node or its control group is full.

A batch system gives a job's processes a control group with a limit; whoever takes more is not told
so by a failed allocation, but killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def room_bytes(root: Path = Path("/")) -> int | None:
    """What is left on the node and in every control group above this process. Local.

    Pages of files count as left: the kernel gives them up. None: the system does not say.

    Args:
        root: where proc/ and sys/ are.
    """
    left = [_of_node(root / "proc/meminfo")]
    for folder, names in _groups(root):
        left.append(_of_group(folder, *names))
    known = [number for number in left if number is not None]
    return max(0, min(known)) if known else None


def _of_node(meminfo: Path) -> int | None:
    kilobytes = _table(meminfo).get("MemAvailable:")
    return None if kilobytes is None else 1024 * kilobytes


def _of_group(folder: Path, limit: str, usage: str, prefix: str) -> int | None:
    """None where it has no limit, or there is no such group."""
    numbers = [_number(folder / name) for name in (limit, usage)]
    if numbers[0] is None or numbers[1] is None:
        return None
    stat = _table(folder / "memory.stat")
    files = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
    return numbers[0] - numbers[1] + files


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders of the memory groups that this process is in, and how their files are called."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            top, names = mount, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            top = mount / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        # In a container the path may be the host's, of which only the top is to be seen.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:depth]), names


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max"
        return None


def _table(path: Path) -> dict[str, int]:
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}

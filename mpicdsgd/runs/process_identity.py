"""Who a process is, and whether one that another process wrote down still lives. No MPI here."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any


def has_ended(owner: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether ``owner`` is known not to live, without waiting."""
    if owner.get("machine") and owner["machine"] == me["machine"]:
        started = _start_of(owner.get("pid"))
        return started is None or started != owner.get("started")
    # Slurm starts a job again only when it has ended what was left of it.
    same = bool(owner.get("job")) and owner["job"] == me["job"]
    return same and int(owner.get("restart", 0)) < int(me["restart"])


def identity() -> dict[str, Any]:
    pid, environment = os.getpid(), os.environ
    job = environment.get("SLURM_JOB_ID", "")
    restart = environment.get("SLURM_RESTART_COUNT", "")
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "started": _start_of(pid),
        "job": f"{environment.get('SLURM_CLUSTER_NAME', '')} {job}".strip() if job else "",
        "restart": int(restart) if restart.isdecimal() else 0,
        "since": now(),
    }


def _machine() -> str:
    """Where a pid means what it means here: this boot of this host, and these processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _start_of(pid: Any) -> int | None:
    """When process ``pid`` began, in the kernel's ticks; None if it has ended."""
    try:
        text = Path(f"/proc/{int(pid)}/stat").read_text()
        fields = text.rpartition(")")[2].split()
        # Ended already, and only not yet asked about by its parent.
        return None if fields[0] in ("Z", "X") else int(fields[19])
    except (OSError, ValueError, IndexError, TypeError):
        return None


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")

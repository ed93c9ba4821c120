"""What is left of the node's and the groups' memory, from files as Linux writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpicdsgd.checkpoints import rank_file, writer_process
from mpicdsgd.checkpoints.memory_limit import room_bytes
from mpicdsgd.checkpoints.rank_file import About
from mpicdsgd.checkpoints.writer_process import WriterProcess

GB = 1 << 30


def system(root: Path, available: int | None, cgroup: str, files: dict[str, str]) -> Path:
    """A root with these files; ``available`` in bytes."""
    meminfo = "" if available is None else f"MemAvailable:   {available // 1024} kB\n"
    texts = {"proc/meminfo": f"MemTotal:  99 kB\n{meminfo}HugePages_Total: 0\n", **files}
    for name, text in {**texts, "proc/self/cgroup": cgroup}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def version_2(path: str, limit: Any, used: int, files: int = 0) -> dict[str, str]:
    folder = f"sys/fs/cgroup/{path}".rstrip("/")
    stat = f"anon 5\nactive_file {files // 2}\ninactive_file {files - files // 2}\nshmem 77\n"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


def version_1(path: str, limit: int, used: int, files: int = 0) -> dict[str, str]:
    folder = f"sys/fs/cgroup/memory/{path}".rstrip("/")
    stat = f"active_file 1\ntotal_active_file {files}\ntotal_inactive_file 0\n"
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


def test_the_node_alone(tmp_path: Path) -> None:
    assert room_bytes(system(tmp_path, 3 * GB, "0::/\n", {})) == 3 * GB


def test_nothing_is_known(tmp_path: Path) -> None:
    assert room_bytes(tmp_path) is None
    assert room_bytes(system(tmp_path, None, "0::/\n", {})) is None


@pytest.mark.parametrize("path", ["slurm/job_7/step_0", "/../../slurm/job_7/step_0"])
def test_any_group_above_may_be_the_limit(tmp_path: Path, path: str) -> None:
    files = {
        **version_2("slurm/job_7/step_0", "max", GB // 2),
        **version_2("slurm/job_7", 2 * GB, GB, files=GB // 4),
        **version_2("slurm", 8 * GB, 3 * GB),
    }
    assert room_bytes(system(tmp_path, 9 * GB, f"0::{path}\n", files)) == GB + GB // 4


def test_version_1_beside_an_empty_version_2(tmp_path: Path) -> None:
    files = {**version_1("a/b", 2 * GB, GB, files=1000), **version_1("", 1 << 62, 4 * GB)}
    cgroup = "9:name=systemd:/\n4:cpu,memory:/a/b\n0::/\n"
    assert room_bytes(system(tmp_path, 9 * GB, cgroup, files)) == GB + 1000


def test_a_container_sees_its_own_group_as_the_top(tmp_path: Path) -> None:
    files = version_2("", 2 * GB, GB)
    assert room_bytes(system(tmp_path, 9 * GB, "0::/kubepods/pod1/abc\n", files)) == GB


def test_over_the_limit_is_no_room(tmp_path: Path) -> None:
    assert room_bytes(system(tmp_path, 9 * GB, "0::/a\n", version_2("a", GB, 2 * GB))) == 0


def test_here() -> None:
    left = room_bytes()
    assert left is not None
    assert 0 < left < 1 << 50


@pytest.mark.parametrize(("on_node", "fits"), [(1, True), (3, False)])
def test_a_copy_that_does_not_fit_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_node: int, fits: bool
) -> None:
    """Before anything is taken, and for all who copy at the same time; room once had is kept."""
    monkeypatch.setattr(writer_process, "room_bytes", lambda: 1_000_000)
    arrays = {"x": np.zeros(100_000, np.float32)}
    about = About(1, 1, 0, 1, {}, rank_file.layout(arrays))
    writer = WriterProcess(on_node)
    if fits:
        writer.write(tmp_path, about, arrays)
        assert "entries" in (writer.answer(timeout_s=60) or {})
        monkeypatch.setattr(writer_process, "room_bytes", lambda: 0)
        writer.write(tmp_path, about, arrays)
        assert "entries" in (writer.answer(timeout_s=60) or {})
    else:
        with pytest.raises(OSError, match="0 MB for each of 3 on the node, and 1 MB are left"):
            writer.write(tmp_path, about, arrays)
    writer.close()

"""Whether two runs' folders hold the same result, bit by bit, but for times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("checkpoints/step-*/manifest.*.json"))


def last_state(run_dir: Path, agents: int) -> dict[str, Any]:
    """Every array of the last checkpoint as bytes, and the rest of its state but for times."""
    newest = checkpoints(run_dir)[-1]
    folder, generation = newest.parent, newest.name.split(".")[1]
    state: dict[str, Any] = {"step": folder.name}
    for agent in range(agents):
        with h5py.File(folder / f"rank-{agent:04d}.{generation}.h5") as file:

            def take(name: str, item: Any, agent: int = agent) -> None:
                if isinstance(item, h5py.Dataset):
                    state[f"{agent}/{name}"] = (str(item.dtype), item.shape, item[()].tobytes())

            file["arrays"].visititems(take)
            meta = json.loads(bytes(file["about"][()]))["meta"]
        state[f"{agent}/meta"] = without_times(meta)
    return state


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("time_s", "wait_s")}
    return value


def metrics(run_dir: Path) -> list[Any]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [without_times(json.loads(line)) for line in lines]


def same_run(whole: Path, other: Path, agents: int) -> None:
    """Assert that metrics and last checkpoint are the same."""
    assert metrics(other) == metrics(whole)
    expected, found = last_state(whole, agents), last_state(other, agents)
    assert found.keys() == expected.keys()
    assert [key for key in expected if found[key] != expected[key]] == []
    assert {"0/x", "0/random/torch"} <= expected.keys()


def same_trace(whole: Path, other: Path) -> None:
    """Assert that the traces are the same, line by line: both wrote them at the same steps."""
    trace = (whole / "trace.jsonl").read_text()
    assert (other / "trace.jsonl").read_text() == trace
    assert json.loads(trace.splitlines()[-1])["step"] == metrics(whole)[-1]["step"]

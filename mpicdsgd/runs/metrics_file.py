"""A run's records: ``metrics.jsonl``, TensorBoard, and the versions that a result depends on.

A line of metrics is strict JSON: NaN and infinities are the strings "NaN", "Infinity" and
"-Infinity", which `read` turns back into numbers. Keys are only ever added.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from mpicdsgd.common.errors import UserError
from mpicdsgd.common.files import is_regular, reason, swing_link, write_whole
from mpicdsgd.common.strict_json import NUMBERS, numbers, strict

log = logging.getLogger("mpicdsgd")

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
_TAGS = {  # TensorBoard's tag for a value at this place of a line
    "loss/train": ("train_loss", "mean"),
    "loss/test": ("test_loss", "mean"),
    "accuracy/train": ("train_accuracy", "mean"),
    "accuracy/test": ("test_accuracy", "mean"),
    "accuracy/test_std_over_agents": ("test_accuracy", "std"),
    "averaged_model/loss": ("averaged_model", "test_loss"),
    "averaged_model/accuracy": ("averaged_model", "test_accuracy"),
    "centre/loss": ("centre", "test_loss"),
    "centre/accuracy": ("centre", "test_accuracy"),
    "consensus/max": ("consensus", "max"),
    "consensus/rms": ("consensus", "rms"),
    "run/lr": ("lr",),
    "run/time_s": ("time_s",),
    "run/wait_s": ("wait_s",),
    "run/bytes_sent": ("bytes_sent",),
}


class Metrics:
    """The run's metrics file of this generation, open for lines. Local: one rank has it enabled.

    Or another record of the same manner, by its ``name``, which then stands for metrics here. The
    file ``metrics.gNNNN.jsonl`` begins with the lines up to ``resume_step`` of the generation
    before; ``metrics.jsonl`` is a link to it. Append a step's line before that step's checkpoint is
    written: a line that comes after is lost if the job ends between the two.

    Args:
        run_dir: the run's folder, which exists.
        generation: this run's, from `runs.owner.claim`.
        resume_step: the checkpoint's step; None: the run starts anew and so does the file.
        enabled: False makes every method do nothing (all ranks but one).
        tensorboard: also write scalars for TensorBoard, below ``tensorboard/gNNNN``.
        resume_generation: the checkpoint's generation, whose lines go on; None: the newest before.
        name: of the record.

    Attributes:
        last: the last line that was there already, with its numbers; None if there is none.

    Raises:
        UserError: the file cannot be written, or TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        generation: int,
        resume_step: int | None = None,
        enabled: bool = True,
        *,
        tensorboard: bool = False,
        resume_generation: int | None = None,
        name: str = "metrics",
    ) -> None:
        self._pending = b""
        self._handle = -1
        self._name, self._generation = name, generation
        self._board: Any = None
        self.last: dict[str, Any] | None = None
        if not enabled:
            return
        if tensorboard:
            self._board = _tensorboard(run_dir / "tensorboard" / f"g{generation:04d}")
        self.path = run_dir / f"{name}.g{generation:04d}.jsonl"
        try:
            before = {g: p for g, p in files(run_dir, name).items() if g < generation}
            kept = _kept(before, resume_step, resume_generation)
            write_whole(self.path, b"".join(line + b"\n" for line, _ in kept))
            self._handle = os.open(self.path, _FLAGS)
            self._size_bytes = os.fstat(self._handle).st_size
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {reason(error)}") from None
        self._link()
        for _, record in kept:
            self._scalars(record)
            self.last = numbers(record)

    def append(self, record: dict[str, Any]) -> None:
        """Add a line, on the disk when this returns. ``record["step"]`` is an int.

        Where that fails (disk full) the log says so, training goes on, and the line is written
        together with the next.
        """
        if self._handle < 0:
            return
        line = strict(record)
        assert type(line.get("step")) is int, "a record has its step"
        self._pending += json.dumps(line, allow_nan=False).encode() + b"\n"
        try:
            if not self.path.exists():
                self._anew()
            rest = memoryview(self._pending)
            while rest:
                rest = rest[os.write(self._handle, rest) :]
            os.fsync(self._handle)
            self._size_bytes += len(self._pending)
            self._pending = b""
        except OSError as error:
            log.warning("%s: a line could not be written (%s)", self.path, reason(error))
            with contextlib.suppress(OSError):
                os.truncate(self._handle, self._size_bytes)  # no half line before the next
        self._scalars(line)

    def _anew(self) -> None:
        """Somebody has removed the file, or the run's folder: write it again, as it is open yet."""
        lines = os.pread(self._handle, self._size_bytes, 0)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, lines)
        os.close(self._handle)
        self._handle = os.open(self.path, _FLAGS)
        self._link()
        log.warning("%s was removed while the run goes on: it is written anew", self.path)

    def _link(self) -> None:
        swing_link(self.path.with_name(f"{self._name}.jsonl"), self.path.name, self._generation)

    def close(self) -> None:
        """Close the file. A second time, it does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        if self._board is not None:
            self._board.close()
            self._board = None

    def _scalars(self, record: dict[str, Any]) -> None:
        if self._board is None:
            return
        for tag, place in _TAGS.items():
            value: Any = record
            for key in place:
                value = value.get(key) if isinstance(value, dict) else None
            value = NUMBERS.get(value, value) if isinstance(value, str) else value
            if isinstance(value, (int, float)):
                self._board.add_scalar(tag, value, record["step"])
        self._board.flush()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, or of a run's folder the newest file's, in their order. Local.

    Damaged lines and a half last one are left out, and the log says how many.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            found = files(path)
            path = found[max(found)] if found else path / "metrics.jsonl"
        if not is_regular(path):
            raise UserError(f"there are no metrics at {path}: give a run's folder or metrics.jsonl")
        return [numbers(record) for _, record in _lines(path)]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None


def files(run_dir: Path, name: str = "metrics") -> dict[int, Path]:
    """A record's files in a run's folder, by generation. Raises OSError."""
    pattern = re.compile(rf"{name}\.g(\d{{4,9}})\.jsonl")
    names = os.listdir(run_dir)
    return {int(match[1]): run_dir / match[0] for n in names if (match := pattern.fullmatch(n))}


def _kept(
    before: dict[int, Path], resume_step: int | None, resume_generation: int | None
) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines that a resumed run goes on from."""
    if resume_step is None:
        return []
    before = {g: path for g, path in before.items() if is_regular(path)}
    if not before:
        return []
    source = resume_generation if resume_generation in before else max(before)
    return [(raw, line) for raw, line in _lines(before[source]) if line["step"] <= resume_step]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Every sound line of a metrics file, raw and parsed."""
    sound: list[tuple[bytes, dict[str, Any]]] = []
    dropped = 0
    for raw in path.read_bytes().split(b"\n"):
        if not raw:
            continue
        try:
            record = json.loads(raw)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and type(record.get("step")) is int:
            sound.append((raw, record))
        else:
            dropped += 1
    if dropped:
        log.warning("%s: %d damaged or half line(s) left out", path, dropped)
    return sound


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            'TensorBoard is not installed: pip install "mpicdsgd[tensorboard]", '
            "or leave it out of the config"
        ) from None
    try:
        make: Any = SummaryWriter
        return make(log_dir=str(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {reason(error)}") from None

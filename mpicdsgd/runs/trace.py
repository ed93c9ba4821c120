"""The record of every step that `run.theory = true` makes: ``trace.jsonl``, and how to read it.

    k        step, at the state x_k before it
    alpha_k  its step size
    f_j      agent j's minibatch loss at x_k (with look-ahead momentum: at x_k + mu v_k)
    D_j      1/2 sum_l Pi[j,l] |p_l - p_j|^2 at x_k, of the published parameters
    h_j      the gradient that was applied, with weight decay
    P_j      weight decay/2 |x_j|^2, the part of the objective that f_j leaves out
    M_j      |x_(k+1),j - x_k,j|^2, of CDSGD alone, whose update is -alpha_k times (7)

A line holds the steps between two evaluations or checkpoints, as sums over agents. For a doubly
stochastic Pi the D_j add up to |X|^2_(I - Pi), so that, but for the minibatches' noise,

    V(x_k, alpha) = sum_j (f_j + P_j) + 1/(2 alpha) sum_j D_j   eq. (9), arXiv 1706.07880
    |grad V|^2    = sum_j M_j / alpha^2                         eq. (7)

and ``gradient``, sum_j |h_j|^2, is what the bound L^2 is an upper bound of.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpicdsgd.common import strict_json
from mpicdsgd.common.errors import UserError
from mpicdsgd.common.files import is_regular, reason
from mpicdsgd.runs import metrics_file

if TYPE_CHECKING:  # a trace is read without MPI
    import torch
    from mpi4py import MPI

    from mpicdsgd.algorithms.measured import Measured

# Over agents; lr is the same on all. The later ones a trace may lack.
SUMS = ("loss", "disagreement", "gradient", "batch", "penalty", "moved")
_COLUMNS = ("lr", *SUMS)
_OPTIONAL = ("penalty", "moved")


@dataclass(frozen=True)
class Trace:
    """Every step of a run, in order; arrays of shape (steps,), float64 but for ``step``.

    Attributes:
        step: k, int64, increasing. Steps are missing where the run went on without a trace.
        lr: alpha_k.
        loss: sum over agents of their minibatches' mean losses at x_k.
        disagreement: sum_j D_j = |X|^2_(I - Pi), see the module.
        gradient: sum_j |h_j|^2.
        batch: samples in the agents' minibatches together.
        penalty: sum_j P_j; 0 without weight decay, NaN where an older version wrote the line.
        moved: sum_j M_j; NaN where it was not measured.
    """

    step: NDArray[np.int64]
    lr: NDArray[np.float64]
    loss: NDArray[np.float64]
    disagreement: NDArray[np.float64]
    gradient: NDArray[np.float64]
    batch: NDArray[np.float64]
    penalty: NDArray[np.float64]
    moved: NDArray[np.float64]


class NoStepsYet(UserError):
    """There is a trace, which is written at evaluations, and none has been yet."""


class Lines:
    """The file ``trace.gNNNN.jsonl``, kept as `metrics_file.Metrics` says. Local.

    Args:
        run_dir, generation, resume_step, enabled, resume_generation: see there.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        generation: int,
        resume_step: int | None = None,
        enabled: bool = True,
        resume_generation: int | None = None,
    ) -> None:
        self._file = metrics_file.Metrics(
            run_dir,
            generation,
            resume_step,
            enabled,
            resume_generation=resume_generation,
            name="trace",
        )

    def append(self, first: int, lr: list[float], everyone: NDArray[np.float64]) -> None:
        """Add the line of the steps from ``first`` on, on the disk when this returns.

        Args:
            lr: of each step, on all agents.
            everyone: see `line_of`.
        """
        self._file.append(line_of(first, lr, everyone))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Recorder:
    """Collects a run's steps and writes their sums. Making it is local, `flush` collective.

    Rank 0 of ``comm`` has the file ``trace.gNNNN.jsonl``, kept as `metrics_file.Metrics` says:
    flush before each checkpoint.

    Args:
        comm: the agents.
        run_dir, generation, resume_step, resume_generation: see `runs.metrics_file.Metrics`.
        knows_moved: whether what a step moved is an M_j of the module.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        run_dir: Path,
        generation: int,
        resume_step: int | None = None,
        resume_generation: int | None = None,
        *,
        knows_moved: bool = False,
    ) -> None:
        self._comm, self._knows_moved = comm, knows_moved
        self._steps: list[tuple[float, float | torch.Tensor, int]] = []
        self._lines = Lines(run_dir, generation, resume_step, comm.rank == 0, resume_generation)

    def add(self, lr: float, loss: float | torch.Tensor, batch: int) -> None:
        """Note a step: its step size, this agent's mean loss and its number of samples. Local.

        A tensor, shape (), is not waited for.
        """
        self._steps.append((lr, loss, batch))

    def flush(self, measured: list[Measured]) -> None:
        """Append the steps since the last flush, on the disk when this returns. Collective.

        Args:
            measured: of the same steps, from `AgentOptimizer.measured`.
        """
        steps, self._steps = self._steps, []
        assert len(steps) == len(measured), "a step is added once, and measured once"
        if not steps:
            return
        mine = np.array(
            [
                (float(f), m.disagreement, m.gradient, batch, m.penalty, m.moved)
                for (_, f, batch), m in zip(steps, measured, strict=True)
            ]
        )
        if not self._knows_moved:
            mine[:, SUMS.index("moved")] = math.nan
        # Not Reduce, whose order, and so the bits, may depend on the number of steps: a restart
        # may flush at other ones.
        everyone = np.empty((self._comm.size, *mine.shape)) if self._comm.rank == 0 else None
        self._comm.Gather(mine, everyone, root=0)
        if everyone is not None:
            self._lines.append(measured[0].step, [step[0] for step in steps], everyone)

    def close(self) -> None:
        """Close the file. Local."""
        self._lines.close()


def line_of(first: int, lr: list[float], agents_NKS: NDArray[np.float64]) -> dict[str, Any]:
    """A line of the trace, for `runs.metrics_file.Metrics.append`.

    Args:
        first: k of its first step.
        lr: alpha_k of each of the K steps.
        agents_NKS: loss, disagreement, gradient, batch, penalty and moved of each agent in each
            step, shape (N, K, 6); what nobody has measured is NaN, and left out.
    """
    sums = dict(zip(SUMS, agents_NKS.sum(axis=0).T.tolist(), strict=True))
    sums["batch"] = [int(samples) for samples in sums["batch"]]
    for name in _OPTIONAL:
        if all(math.isnan(value) for value in sums[name]):
            del sums[name]
    # "step": completed, as in a line of metrics
    return {"step": first + len(lr), "first": first, "lr": lr, **sums}


def read(run_dir: Path) -> Trace:
    """The trace of a finished or running run. Local.

    A last line without an end is still being written, and left out.

    Raises:
        UserError: there is none, it cannot be read, or a line is damaged.
    """
    try:
        found = metrics_file.files(run_dir, "trace") if Path(run_dir).is_dir() else {}
        if not found or not is_regular(path := found[max(found)]):
            raise UserError(f"no trace in {run_dir}: run with run.theory = true")
        *whole, _ = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"the trace in {run_dir} cannot be read: {reason(error)}") from None
    columns: dict[str, list[NDArray[np.float64]]] = {name: [] for name in _COLUMNS}
    steps: list[NDArray[np.int64]] = []
    done = 0
    for number, raw in enumerate(whole, 1):
        line = _line(raw)
        if line is None or line["first"] < done:
            raise UserError(
                f"{path}, line {number} is damaged: take the line out, and its steps are missing"
            )
        done = line["step"]
        steps.append(np.arange(line["first"], done))
        for name, values in columns.items():
            values.append(np.array(line[name], np.float64))
    if not steps:
        raise NoStepsYet(f"no step is in the trace {path} yet: it is written at evaluations")
    return Trace(np.concatenate(steps), **{k: np.concatenate(v) for k, v in columns.items()})


def _line(raw: bytes) -> dict[str, Any] | None:
    """A line that holds what `Recorder` writes, or None."""
    try:
        line = strict_json.numbers(json.loads(raw))
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not all(
        type(line.get(key)) is int and line[key] >= 0 for key in ("first", "step")
    ):
        return None
    count = line["step"] - line["first"]
    for name in _OPTIONAL:
        line.setdefault(name, [math.nan] * min(count, len(raw)))
    for name in _COLUMNS:
        values = line.get(name)
        if not isinstance(values, list) or len(values) != count or count == 0:
            return None
        if not all(type(value) in (int, float) for value in values):
            return None
    return line

"""Agents: one MPI rank each, their communicator, their graph, and how they agree.

`Agents` duplicates the communicator it is given, so its messages never meet the user's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from mpicdsgd.comm import mpich_under_slurm, shutdown
from mpicdsgd.comm.agreement import agreement, collect, require_same
from mpicdsgd.comm.devices import choose_gpu
from mpicdsgd.common.errors import UserError
from mpicdsgd.common.patience import TIMEOUT_S
from mpicdsgd.graphs.graph import Graph
from mpicdsgd.graphs.mixing_cycle import Mixing, MixingCycle
from mpicdsgd.graphs.mixing_matrix import MixingMatrix
from mpicdsgd.kernels import native

shutdown.install()

log = logging.getLogger("mpicdsgd")

# Up to here two ranks' mixing matrices are the same but for rounding.
ROUNDING = 1e-6
_CHUNK = 1 << 20  # elements reduced at once: 8 MB of float64, whatever the model's size


@dataclass(frozen=True)
class AgentsConfig:
    """Section ``[agents]`` of a run's config."""

    topology: str = "ring"
    mixing: str = "metropolis"
    device: str = "auto"  # "cpu", "cuda" (by the rank's number on its node), "cuda:K"
    threads: int = 0  # per rank; 0: this node's cores shared out over its ranks
    init: str = "broadcast"  # or "local": every agent keeps its own random parameters
    on_death: str = "end"  # of the job, when a rank dies; or "continue": `runs.survival`


@dataclass(frozen=True)
class Turn:
    """One agent's part in a mixing matrix.

    Attributes:
        sources, weights: the agents whose parameters it reads, ascending, and Pi's weights.
        destinations: the agents that read its own.
    """

    sources: tuple[int, ...]
    weights: tuple[float, ...]
    destinations: tuple[int, ...]


class Agents:
    """The agents of one job. Collective over ``comm``.

    Args:
        comm: an mpi4py intracommunicator; it is duplicated, so it stays the caller's.
        mixing: mixing matrix, or a cycle of them, with as many agents as ``comm`` has ranks, the
            same on every rank.
        device: "auto" (a GPU where every rank has one), "cpu", "cuda", or "cuda:K" for GPU K.
        timeout_s: how long an agreement waits for the other ranks, in seconds.

    Attributes:
        rank, size: this agent and how many there are.
        local_rank, local_size: the same among the ranks that share this node's memory.
        node: the lowest rank on this node, which stands for it.
        graph: who ever reads whom.
        sources, destinations: the agents that this one ever reads, and that read it, ascending.
        turns: this agent's part in each matrix of the cycle; in one for all steps, if it is one.
        device: where the parameters are to be, a `torch.device`.
        gpu: this agent's GPU, None on the host.
        generation: of the run, set before an optimizer is made; each restart is a new one.
        cores: this rank's fair share of the cores that it may run on.

    Raises:
        UserError: on every rank, if sizes do not fit or ranks hold different matrices. Of matrices
            that differ by rounding (`ROUNDING`) rank 0's is taken on all, and the log says so.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        mixing: Mixing,
        *,
        device: str = "auto",
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.timeout_s = timeout_s
        self.generation = 0
        with agreement(comm, "Agents()", timeout_s):
            _check_thread_level()
        self.comm: MPI.Intracomm = comm.Dup()
        self.rank: int = self.comm.rank
        self.size: int = self.comm.size
        with self.agreement("Agents(), arguments"):
            if mixing.graph.n != self.size:
                raise UserError(
                    f"the mixing matrix is for {mixing.graph.n} agents, the job has {self.size} "
                    f"ranks: start {mixing.graph.n} ranks or make the graph with n = {self.size}"
                )
        self.mixing = mixing = self._common(mixing)
        self.graph: Graph = mixing.graph
        self.sources = self.graph.sources[self.rank]
        self.destinations = self.graph.destinations[self.rank]
        self.turns = tuple(
            Turn(*turn.row(self.rank)[1:], turn.graph.destinations[self.rank])
            for turn in mixing.turns
        )
        node = self.comm.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)
        self.local_rank, self.local_size = node.rank, node.size
        mine = os.sched_getaffinity(0)
        sharers = sum(mine == other for other in node.allgather(mine))
        self.cores = max(1, len(mine) // sharers)
        self.node = int(node.bcast(self.rank))
        node.Free()
        self.gpu = choose_gpu(self.comm, device, self.local_rank, timeout_s)
        self.device = torch.device("cpu") if self.gpu is None else self.gpu.torch_device
        fallbacks = collect(self.comm, "the update kernel", native.fallback(), timeout_s)
        if self.rank == 0:
            if mpich_under_slurm.REMARK:
                log.warning("%s", mpich_under_slurm.REMARK)
            for text in sorted({text for text in fallbacks if text}):
                ranks = [rank for rank, other in enumerate(fallbacks) if other == text]
                log.warning("%s (ranks %s)", text, ", ".join(map(str, ranks)))
        self._remarked: set[str] = set()

    def remark(self, texts: Iterable[str]) -> None:
        """Warn, once, of what is to be known of graph and matrix by who uses them. Local."""
        for text in texts:
            if self.rank == 0 and text not in self._remarked:
                log.warning("%s", text)
            self._remarked.add(text)

    def agreement(self, name: str) -> AbstractContextManager[None]:
        """A block whose `UserError` on any rank is raised on every rank. Collective at its end."""
        return agreement(self.comm, name, self.timeout_s)

    def require_same(self, what: str, value: str) -> None:
        """Raise a UserError on every rank unless ``value`` is the same on all. Collective."""
        require_same(self.comm, what, value, self.timeout_s)

    def broadcast(self, model: torch.nn.Module | Iterable[torch.Tensor]) -> None:
        """Give every agent rank 0's parameters and buffers, in place. Collective.

        Raises:
            UserError: on every rank, if the models differ in names, shapes or dtypes.
        """
        tensors = _tensors(model)
        self.same_layout(tensors)
        for tensor in tensors.values():
            if tensor.numel() == 0:
                continue
            data = tensor.detach()
            flat = data.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
            for start in range(0, flat.size, 1 << 30):
                self.comm.Bcast(flat[start : start + (1 << 30)], root=0)
            if self.rank != 0:
                received = torch.from_numpy(flat).view(data.dtype).reshape(data.shape)
                with torch.no_grad():
                    tensor.copy_(received)

    def average(self, model: torch.nn.Module | Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The mean over all agents of parameters and buffers, by name. Collective.

        ``model`` is unchanged; the result is on the CPU and can be given to ``load_state_dict``.
        Sums run in float64. Integer tensors (BatchNorm's batch counter) are rank 0's.

        Raises:
            UserError: on every rank, if the models differ in names, shapes or dtypes.
        """
        tensors = _tensors(model)
        self.same_layout(tensors)
        means: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            data = tensor.detach().cpu()
            if data.is_floating_point():
                flat = data.to(torch.float64 if data.dtype == torch.float64 else torch.float32)
                mean = self.mean(flat.contiguous().reshape(-1).numpy())
                means[name] = torch.from_numpy(mean).reshape(data.shape).to(data.dtype)
            else:
                means[name] = self.comm.bcast(data.clone(), root=0)
        return means

    def mean(self, x_D: NDArray[np.floating]) -> NDArray[np.floating]:
        """Mean of ``x_D`` over all agents, shape (D,), summed in float64. Collective."""
        out = np.empty_like(x_D)
        for start in range(0, x_D.size, _CHUNK):
            part = x_D[start : start + _CHUNK].astype(np.float64)
            self.comm.Allreduce(MPI.IN_PLACE, part, MPI.SUM)
            out[start : start + _CHUNK] = part / self.size
        return out

    def _common(self, mixing: Mixing) -> Mixing:
        """One mixing matrix for all ranks, bit by bit. Collective.

        What was computed (``fastest``) has other last bits with another BLAS or CPU.
        """
        what = "the mixing matrix Pi"
        digests = collect(self.comm, what, mixing.digest, self.timeout_s)
        if len(set(digests)) == 1:
            return mixing
        edges = [(turn.graph.directed, turn.graph.edges) for turn in mixing.turns]
        self.require_same(f"{what}'s edges", repr((mixing.graph.n, edges)))
        mine = np.stack([turn.Pi for turn in mixing.turns])
        first = mine.copy()
        self.comm.Bcast(first, root=0)
        off = self.comm.allreduce(float(np.abs(first - mine).max()), MPI.MAX)
        if off > ROUNDING:
            self.require_same(what, mixing.digest)
        if self.rank == 0:
            log.info(
                "mixing %s differs between ranks by rounding, up to %.1g: rank 0's is used",
                mixing.name,
                off,
            )
        turns = tuple(
            MixingMatrix(Pi, turn.graph, turn.name, turn.changes, turn.stochastic)
            for Pi, turn in zip(first, mixing.turns, strict=True)
        )
        if isinstance(mixing, MixingMatrix):
            return turns[0]
        return MixingCycle(turns, mixing.graph, mixing.name)

    def same_layout(self, tensors: dict[str, torch.Tensor]) -> None:
        """Raise a UserError on every rank unless names, shapes and dtypes agree. Collective."""
        layout = [(name, tuple(t.shape), str(t.dtype)) for name, t in tensors.items()]
        self.require_same("the model (names, shapes, dtypes)", repr(layout))

    def share_cores(self, threads: int = 0) -> int:
        """Set torch's threads to ``threads``, or with 0 to `cores`; returns how many. Local.

        With 0 and OMP_NUM_THREADS in the environment, the user has decided already.
        """
        if threads >= 1 or not os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(threads if threads >= 1 else self.cores)
        return torch.get_num_threads()


def _tensors(model: torch.nn.Module | Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    if isinstance(model, torch.nn.Module):
        return dict(model.state_dict(keep_vars=True))
    return {str(i): tensor for i, tensor in enumerate(model)}


def _check_thread_level() -> None:
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise UserError(
            "MPI was started without support for threads: autograd may call it from its own, so "
            'set mpi4py.rc.thread_level = "multiple" (the default) before importing mpi4py.MPI'
        )

"""Which GPU each rank takes, agreed on by all."""

from __future__ import annotations

import logging
import re

from mpi4py import MPI

from mpicdsgd.comm.agreement import agreement, collect, require_same
from mpicdsgd.common.errors import UserError
from mpicdsgd.kernels import gpu
from mpicdsgd.kernels.gpu.cuda import Gpu

log = logging.getLogger("mpicdsgd")


def choose_gpu(comm: MPI.Intracomm, device: str, local_rank: int, timeout_s: float) -> Gpu | None:
    """This rank's GPU with its kernels loaded, or None to compute on the host. Collective.

    The ranks of a node take its GPUs in turn; where there are fewer GPUs than ranks they share.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:K", see `comm.agents.Agents`.
        local_rank: among the ranks of this node.

    Raises:
        UserError: on every rank, where a GPU is asked for that some rank has not got.
    """
    with agreement(comm, "the device", timeout_s):
        named = re.fullmatch(r"auto|cpu|cuda(?::(\d{1,3}))?", device)
        if named is None:
            raise UserError(f'device must be "auto", "cpu", "cuda" or "cuda:K", got "{device}"')
    require_same(comm, "device", device, timeout_s)
    if device == "cpu":
        return None
    reason = gpu.why_not()
    with agreement(comm, "the GPU", timeout_s):
        if reason and device != "auto":
            raise UserError(f'device = "{device}": {reason}; "auto" and "cpu" do without')
        if named[1] is not None and int(named[1]) >= gpu.count():
            raise UserError(f'device = "{device}": this process sees {gpu.count()} GPUs')
    reasons = collect(comm, "who has a GPU", reason, timeout_s)
    if any(reasons):
        seen = sum(map(int, collect(comm, "how many GPUs", str(gpu.count()), timeout_s)))
        if seen and comm.rank == 0:  # else there is nothing to do without
            lacking = [rank for rank, text in enumerate(reasons) if text]
            log.warning(
                "training on the CPU, though there are GPUs: on ranks %s %s",
                ", ".join(map(str, lacking)),
                reasons[lacking[0]],
            )
        return None
    index = local_rank % gpu.count() if named[1] is None else int(named[1])
    chosen: Gpu | None = None
    with agreement(comm, "opening the GPU", timeout_s):
        try:
            chosen = gpu.open_gpu(index)
        except Exception as error:
            raise UserError(f"GPU {index} cannot be used: {error}") from error
    assert chosen is not None
    _say_who_shares(comm, chosen, timeout_s)
    # Where the kernels must be compiled first, one rank does it, then one of each node (whose
    # cache may not be the first one's), and the others find them in the cache.
    for turn in (comm.rank == 0, local_rank == 0, True):
        with agreement(comm, "loading the kernels", timeout_s):
            if turn:
                try:
                    chosen.prepare()
                except Exception as error:
                    raise UserError(f"the kernels cannot be loaded: {error}") from error
    return chosen


def _say_who_shares(comm: MPI.Intracomm, chosen: Gpu, timeout_s: float) -> None:
    cards = collect(comm, "GPUs in use", chosen.identity, timeout_s)
    if comm.rank == 0:
        sharing = [card for card in dict.fromkeys(cards) if cards.count(card) > 1]
        if sharing:
            most = max(cards.count(card) for card in sharing)
            log.warning(
                "%d ranks on %d GPUs: up to %d share one, and take turns on it",
                len(cards),
                len(set(cards)),
                most,
            )
        else:
            log.info("%d ranks, each on a GPU of its own (%s)", len(cards), chosen.name)

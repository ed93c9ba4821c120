"""Does this MPI library move device memory? Found out by doing it, not by asking the library.

A library that does not dies of the attempt, so it is made in a process of its own first: this
module's `main`, alone in an MPI job of one, sends itself device memory by the very operation that
`staged.MessageRoute` uses. Only then do the agents try it with each other, and compare the bytes.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from functools import cache

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpicdsgd.comm.agents import Agents
from mpicdsgd.comm.agreement import collect, wait_for
from mpicdsgd.comm.exchange.header import HEADER_BYTES
from mpicdsgd.comm.exchange.messages import Messages
from mpicdsgd.comm.exchange.staged import device_buffer
from mpicdsgd.comm.exchange.token_transport import peers_of
from mpicdsgd.common import signals
from mpicdsgd.kernels import gpu as gpus
from mpicdsgd.kernels.gpu import Gpu

_SIZES = (HEADER_BYTES, 4 << 20)  # one that MPI sends at once, one that it negotiates
_COMMAND = [sys.executable, "-m", "mpicdsgd.comm.exchange.gpu_aware_probe"]
_ALONE_S = 120.0
# A launcher's variables would make the child believe that it is a rank of this job.
_LAUNCHERS = ("PMI", "OMPI_", "PRTE_", "HYDRA", "HYDI", "MPI_LOCAL", "MPIEXEC", "SLURM_", "PALS_")


def why_not(agents: Agents, gpu: Gpu) -> str:
    """Why device pointers cannot be given to MPI, "" where they can. Collective over the agents."""
    text: str = agents.comm.bcast(_alone(gpu.torch_device.index or 0) if agents.rank == 0 else "")
    if text:
        return text
    wrong = _together(agents, gpu)
    texts = collect(agents.comm, "device pointers in MPI", wrong, agents.timeout_s)
    return next((found for found in texts if found), "")


def _alone(index: int) -> str:
    """Why a process of its own could not do it on GPU ``index``. Local."""
    return _tried((*_COMMAND, str(index)))


@cache
def _tried(command: tuple[str, ...]) -> str:
    """Why ``command`` did not succeed; once for all exchanges, as it takes seconds. Local."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHERS)}
    try:
        with signals.not_for_children():
            done = subprocess.run(
                command, env=env, capture_output=True, text=True, timeout=_ALONE_S, check=False
            )
    except subprocess.TimeoutExpired:
        return f"MPI given device pointers did not come back within {_ALONE_S:g} s"
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"MPI given device pointers dies of {name} (tried in a process of its own)"
    said = done.stderr.strip().splitlines()
    return f"MPI does not move device memory ({said[-1] if said else f'exit {done.returncode}'})"


def _together(agents: Agents, gpu: Gpu) -> str:
    """What went wrong between this agent and its peers. Collective over the agents."""
    peers = peers_of(agents)
    messages = Messages(agents.comm, [(peers, peers)])
    wrong = _try(gpu, messages, agents.rank, peers, agents.timeout_s)
    messages.free()
    return wrong


def _try(gpu: Gpu, messages: Messages, rank: int, peers: tuple[int, ...], timeout_s: float) -> str:
    """Send device memory to the peers and compare what comes. All peers call it."""
    wrong = ""
    for size in _SIZES:
        host = gpu.pinned(size * max(1, len(peers)))
        send, receive = gpu.malloc(size), gpu.malloc(host.size)
        stream = gpu.new_stream()
        host[:size] = _pattern(rank, size)
        gpu.copy(send, host.ctypes.data, size, stream)
        gpu.finish(stream)
        requests = messages.start(
            device_buffer(send, size),
            device_buffer(receive, size * len(peers)),
            size // HEADER_BYTES,
        )
        wait_for(requests, timeout_s, f"agent {rank}, device pointers in MPI")
        gpu.copy(host.ctypes.data, receive, size * len(peers), stream)
        gpu.finish(stream)
        for i, peer in enumerate(peers):
            if not np.array_equal(host[i * size : (i + 1) * size], _pattern(peer, size)):
                wrong = wrong or f"MPI moved device memory wrongly from agent {peer} to {rank}"
        gpu.destroy_stream(stream)
        gpu.free(send)
        gpu.free(receive)
        gpu.unpin(host)
    return wrong


def _pattern(rank: int, size: int) -> NDArray[np.uint8]:
    return np.random.default_rng([rank, size]).integers(0, 256, size, dtype=np.uint8)


def main() -> int:
    """What `_alone` runs: exit code 0 where it works, else a last line that says why not."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it may well die
    reason = gpus.why_not()
    if reason:
        print(reason, file=sys.stderr)
        return 1
    gpu = gpus.open_gpu(int(sys.argv[1]))
    wrong = _try(gpu, Messages(MPI.COMM_SELF, [((0,), (0,))]), 0, (0,), _ALONE_S)
    print(wrong, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

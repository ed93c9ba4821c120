"""Ranks that are forked from a process that has imported torch: most of a short job is imports.

    python forkserver.py serve SOCKET             the server: it has imported them, but not MPI
    python -I -S forkserver.py start SOCKET ARGS  as ``python ARGS``, in a fork of the server

The second one, which a launcher starts in a rank's place, hands its descriptors, environment and
folder over. Then it only stands for the fork: it passes signals on, and ends as the fork does, by
the same signal or with the same code; where it is killed, so is the fork. Beside the socket, a file
SOCKET.PID, with its own process number, has the fork's, and SOCKET.cpu_s what all have used.

What differs from a start of its own: the fork's parent is the server, /proc shows the server's
command line and environment for it, and all ranks have one hash seed. Once a fork has ended, its
launcher no longer kills what is left of its process group. PYTHON... variables are not looked at;
the server's PYTHONPATH counts.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import sys

TYPE_CHECKING = False  # `typing` is not worth its import
if TYPE_CHECKING:
    from typing import Any

_FORWARDED = [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2]
_FORWARDED += [signal.SIGTERM, signal.SIGCONT, signal.SIGALRM]


def start(path: str, words: list[str]) -> None:
    """Have the server fork, and stand for the fork until it ends. Does not return."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    with os.scandir("/proc/self/fd") as entries:
        listed = sorted(int(entry.name) for entry in entries)
    descriptors = [number for number in listed if _is_open(number)]
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)
    asked = {"argv": words, "env": dict(os.environ), "cwd": os.getcwd(), "fds": descriptors}
    text = json.dumps(asked).encode()
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    server.sendmsg([len(text).to_bytes(4, "little")], ancillary)
    server.sendall(text)
    answers = server.makefile("r")
    fork = int(answers.readline())
    _put(f"{path}.{os.getpid()}", str(fork))
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in descriptors:  # who reads from them is to see the fork's end
        if number <= 2:
            os.dup2(nothing, number)
        else:
            os.close(number)

    def forward(number: int, frame: Any) -> None:
        server.send(bytes([number]))

    for number in _FORWARDED:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    line = answers.readline()
    if not line:
        os._exit(255)  # the server is gone
    status = int(line)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.pause()
    os._exit(os.WEXITSTATUS(status))


def _put(path: str, text: str) -> None:
    with open(f"{path}.tmp", "w") as file:
        file.write(text)
    os.replace(f"{path}.tmp", path)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


class Server:
    """Forks for who asks at ``path``; one at a time, so a fork has no other's descriptors."""

    def __init__(self, path: str) -> None:
        import selectors

        self._path, self._cpu_s = path, 0.0
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(path)
        self._listening.listen(64)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._forks: dict[socket.socket, tuple[int, int]] = {}  # by client: process, pidfd
        self._clients: dict[int, socket.socket] = {}  # by pidfd

    def serve(self) -> dict[str, Any]:
        """Does not return, but in a fork: what it is to run."""
        import selectors

        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listening:
                    client, _ = self._listening.accept()
                    asked = _received(client)
                    if asked is None:
                        client.close()
                        continue
                    process = os.fork()
                    if process == 0:
                        self._leave(client)
                        return asked
                    for number in asked["received"]:
                        os.close(number)
                    handle = os.pidfd_open(process)
                    self._forks[client] = process, handle
                    self._clients[handle] = client
                    self._selector.register(client, selectors.EVENT_READ)
                    self._selector.register(handle, selectors.EVENT_READ)
                    _tell(client, f"{process}\n")
                elif isinstance(key.fileobj, socket.socket):
                    self._heard(key.fileobj)
                elif key.fileobj in self._clients:
                    self._ended(key.fileobj)

    def _heard(self, client: socket.socket) -> None:
        if client not in self._forks:  # its fork has ended meanwhile
            return
        try:
            numbers = client.recv(64)
        except OSError:
            numbers = b""
        process, handle = self._forks[client]
        for number in numbers or [signal.SIGKILL]:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
        if not numbers:
            with contextlib.suppress(ProcessLookupError):  # launchers kill the whole group
                os.killpg(process, signal.SIGKILL)
            self._selector.unregister(client)

    def _ended(self, handle: int) -> None:
        client = self._clients.pop(handle)
        process, _ = self._forks.pop(client)
        _, status, used = os.wait4(process, 0)
        self._cpu_s += used.ru_utime + used.ru_stime
        _put(f"{self._path}.cpu_s", str(self._cpu_s))
        self._selector.unregister(handle)
        os.close(handle)
        if client in self._selector.get_map():
            self._selector.unregister(client)
        _tell(client, f"{status}\n")
        client.close()

    def _leave(self, client: socket.socket) -> None:
        """In a fork: close what is the server's."""
        self._selector.close()
        self._listening.close()
        client.close()
        for other, (_, handle) in self._forks.items():
            other.close()
            os.close(handle)


def _tell(client: socket.socket, text: str) -> None:
    with contextlib.suppress(OSError):  # it has been killed
        client.sendall(text.encode())


def _received(client: socket.socket) -> dict[str, Any] | None:
    """A request, with the "received" descriptors; None where the client has been killed."""
    numbers = array.array("i")
    size = 64 * numbers.itemsize
    head, ancillary, _, _ = client.recvmsg(4, socket.CMSG_SPACE(size))
    for _, _, data in ancillary:
        numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    text = b""
    while head and len(text) < int.from_bytes(head, "little"):
        part = client.recv(1 << 16)
        if not part:
            break
        text += part
    if not head or len(text) < int.from_bytes(head, "little"):
        for number in numbers:
            os.close(number)
        return None
    asked: dict[str, Any] = json.loads(text)
    asked["received"] = list(numbers)
    return asked


def become(asked: dict[str, Any]) -> list[str]:
    """In a fork: take over what the client handed over; its arguments."""
    os.setsid()
    # Through numbers that are free: one's number may be another's target.
    above = 1 + max([*asked["fds"], *asked["received"]])
    import fcntl

    moved = [fcntl.fcntl(number, fcntl.F_DUPFD, above) for number in asked["received"]]
    for number in asked["received"]:
        os.close(number)
    for number, target in zip(moved, asked["fds"], strict=True):
        os.dup2(number, target)
        os.close(number)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    words: list[str] = asked["argv"]
    return words


def _import_all() -> None:
    """What ranks import, but for MPI, which would be started, and this package, which is tested."""
    import h5py  # noqa: F401
    import networkx  # noqa: F401
    import safetensors.torch  # noqa: F401
    import tomli_w  # noqa: F401
    import torch
    import xxhash  # noqa: F401

    assert "mpi4py.MPI" not in sys.modules
    assert torch.get_num_threads() == 1, "threads do not survive a fork"


if __name__ == "__main__":
    command, path, *words = sys.argv[1:]
    if command == "start":
        start(path, words)
    _import_all()
    words = become(Server(path).serve())
    import runpy

    del sys.path[0]  # this file's folder, which is in PYTHONPATH too
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(os.path.realpath(words[0])))
        runpy.run_path(words[0], run_name="__main__")

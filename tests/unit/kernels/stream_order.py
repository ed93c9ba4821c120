"""A simulated machine: streams, events, messages and memory that notices races.

CUDA's rules: a host runs ahead of its streams; a stream does its work in order, at any later time;
a wait is for the last record made before the call, and for nothing if there was none. Records and
waits take effect at once: that somebody acts on them later is an order played anyway.

MPI's rules: the messages of a pair meet the receives in the order of posting, and are then under
way on their own, each at its pace. A send may be over before it has met a receive, or may not.

See test_gpu_protocol.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any

Check = Callable[[], bool]
Until = Generator[Check, None, None]  # yields what it waits for
NOW: Check
NEVER: Check
NOW, NEVER = (lambda: True), (lambda: False)
PARTS = range(2)  # of every buffer: the chunks of a staged transfer


class Race(Exception):
    """What must not happen."""


class Memory:
    version: Any = None
    readers, written, freed = 0, False, False


def parts() -> list[Memory]:
    return [Memory() for _ in PARTS]


class Access:
    """A kernel, a copy or a message: it begins and ends, and anything may happen between.

    Args:
        reads: memory, and the version that must be there.
        writes: memory, and the version that will be there; memory: a copy of what it holds.
    """

    def __init__(self, reads: Iterable[tuple[Memory, Any]], writes: Iterable[tuple[Memory, Any]]):
        self.reads, self.writes = list(reads), list(writes)

    def begin(self) -> None:
        sources = {of for _, of in self.writes if isinstance(of, Memory)}
        self.writes = [(m, of.version if of in sources else of) for m, of in self.writes]
        written = {memory for memory, _ in self.writes}
        self.read = ({memory for memory, _ in self.reads} | sources) - written
        for memory, version in self.reads:
            if memory.version != version:
                raise Race(f"{memory.version} is read instead of {version}")
        for memory in self.read | written:
            if memory.freed or memory.written or (memory in written and memory.readers):
                raise Race(f"{memory.version} is in use or freed")
            memory.readers += memory in self.read
            memory.written = memory in written

    def end(self) -> None:
        for memory in self.read:
            memory.readers -= 1
        for memory, version in self.writes:
            memory.written, memory.version = False, version


def copy(source: list[Memory], to: list[Memory]) -> Access:
    return Access([], zip(to, source, strict=True))


class Record:
    done = False

    def is_done(self) -> bool:
        return self.done


class Stream:
    def __init__(self) -> None:
        self.queue: deque[Access | tuple[str, Record]] = deque()
        self.busy = False

    def record(self) -> Record:
        self.queue.append(("record", record := Record()))
        return record

    def wait(self, record: Record | None) -> None:
        self.queue += [] if record is None else [("wait", record)]

    def settle(self) -> bool:
        """Do what only lets others go on; whether there was any."""
        moved = False
        while self.queue and isinstance(head := self.queue[0], tuple):
            if head[0] == "wait" and not head[1].done:
                break
            head[1].done = moved = True
            self.queue.popleft()
        return moved

    def ready(self) -> bool:
        return bool(self.queue) and isinstance(self.queue[0], Access)

    def go(self) -> None:
        access = self.queue[0]
        assert isinstance(access, Access)
        if self.busy:
            access.end()
            self.queue.popleft()
        else:
            access.begin()
        self.busy = not self.busy


class Channel:
    """The messages from one agent to another.

    Args:
        start: called with the stream of a message when it may begin.
        at_once: whether the next message may leave before its receive is posted.
    """

    def __init__(self, start: Callable[[Stream], None], at_once: Check) -> None:
        self.start, self.at_once = start, at_once
        self.sends: deque[tuple[Any, list[Memory], Stream]] = deque()
        self.receives: deque[tuple[Any, list[Memory], Record]] = deque()

    def send(self, label: Any, memory: list[Memory]) -> Check:
        """Post a send; whether ``memory`` has been read. ``label``: which message this is."""
        message, wire = [Memory() for _ in memory], Stream()
        wire.queue.append(copy(memory, message))
        gone = wire.record()
        if self.at_once():
            self.start(wire)
        self.sends.append((label, message, wire))
        self.meet()
        return gone.is_done

    def receive(self, label: Any, memory: list[Memory]) -> Check:
        """Post a receive; whether the message has come. ``label``: which one is meant."""
        arrived = Record()
        self.receives.append((label, memory, arrived))
        self.meet()
        return arrived.is_done

    def meet(self) -> None:
        if not (self.sends and self.receives):
            return
        sent, message, wire = self.sends.popleft()
        wanted, memory, arrived = self.receives.popleft()
        if sent != wanted:
            raise Race(f"message {sent} meets the receive of {wanted}")
        wire.queue += [copy(message, memory), ("record", arrived)]
        self.start(wire)


class Host:
    """A program, or an errand within one, that goes on when what it yielded is true."""

    def __init__(self, life: Until) -> None:
        self.life, self.until, self.over = life, NOW, False

    def ready(self) -> bool:
        return not self.over and self.until()

    def go(self) -> None:
        self.until = next(self.life, NEVER)
        self.over = self.until is NEVER

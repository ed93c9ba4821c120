"""What a step must send, what a rank must hold, and what a network would make of it.

The first two are exact, and `scaling.py` holds what it counts and measures against them
(docs/memory.md says the second in words). The third is Hockney's model: an agent sends its messages
one after another, each takes alpha + bytes / bandwidth, and receives meanwhile. It knows no
congestion, one rank on each node, and nothing of how values are summed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

HEADER_BYTES = 64
WIRE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ALLREDUCE = "Allreduce"


# What a step sends


@dataclass(frozen=True)
class Place:
    """An agent's place in its graph, in one turn where that changes, and how it exchanges.

    Attributes:
        readers, sources: agents that read it, and that it reads, in this turn.
        peers: agents that in any turn have an edge from or to it.
        far_readers, far_sources: those whose values go in messages, not in place.
        tokens: headers travel alone, to all peers: some values are read in place, or the graph
            changes by turns. Else a header goes with the values.
        shared: some agents read in place, from two buffers of each.
    """

    readers: int
    sources: int
    peers: int
    far_readers: int
    far_sources: int
    tokens: bool
    shared: bool


@dataclass(frozen=True)
class Sent:
    """Of one agent in one step.

    Attributes:
        size_bytes: headers, and values once for each reader, also where it reads them in place.
        messages, message_bytes: given to MPI.
    """

    size_bytes: int
    messages: int
    message_bytes: int


def padded(size_bytes: int) -> int:
    """In whole blocks of 64 bytes."""
    return -(-size_bytes // HEADER_BYTES) * HEADER_BYTES


def elements(lengths: Iterable[int]) -> int:
    """D: float32 elements of tensors that each begin at a multiple of 64 bytes."""
    return sum(padded(4 * n) // 4 for n in lengths)


def sent(place: Place, size: int, wire: str) -> Sent:
    """What one agent sends in a step of one mixing round, of ``size`` elements D."""
    values = padded(WIRE_BYTES[wire] * size)
    if not place.tokens:
        total = place.readers * (HEADER_BYTES + values)
        return Sent(total, place.readers, total)
    headers = place.peers * HEADER_BYTES
    return Sent(
        headers + place.readers * values,
        place.peers + place.far_readers,
        headers + place.far_readers * values,
    )


# What a rank holds


def memory(
    place: Place,
    lengths: Sequence[int],
    wire: str,
    *,
    momentum: bool = True,
    look_ahead: bool = False,
    rounds: int = 1,
) -> dict[str, int]:
    """Bytes of one rank on the CPU, by what they are for, once all of it has been written to.

    Where the graph changes by turns, the turn with the most sources settles it.

    Args:
        lengths: elements of each parameter tensor, all of which have gradients.
    """
    flat = 4 * elements(lengths)
    values = padded(WIRE_BYTES[wire] * elements(lengths))
    if place.tokens:
        published = 2 * values + HEADER_BYTES if place.shared else values
        received = HEADER_BYTES * (1 + place.peers) + place.far_sources * values
    else:
        published = HEADER_BYTES + values
        received = place.sources * (HEADER_BYTES + values)
    return {
        "parameters": flat,
        "gradients": 4 * sum(lengths),
        "momentum": flat if momentum else 0,
        "look-ahead": flat if look_ahead else 0,
        "rounds": flat if rounds > 1 else 0,
        "published": published,
        "received": received,
    }


# Hockney's model


@dataclass(frozen=True)
class Link:
    """Seconds of a message without bytes, and bytes per second."""

    alpha_s: float
    bandwidth: float

    def seconds(self, messages: float, size_bytes: float) -> float:
        return messages * self.alpha_s + size_bytes / self.bandwidth


@dataclass(frozen=True)
class Point:
    """One agent's messages and bytes in an exchange, and how long it took."""

    messages: int
    size_bytes: int
    seconds: float


@dataclass(frozen=True)
class Fit:
    """The link that fits best, and how far points are from it, relative to themselves."""

    link: Link
    rms: float
    worst: float


# Examples, not measurements.
NETWORKS = {
    "hdr100": Link(2e-6, 100e9 / 8),
    "ndr400": Link(2e-6, 400e9 / 8),
    "ethernet10": Link(30e-6, 10e9 / 8),
}


def fit(points: Sequence[Point]) -> Fit:
    """Least squares of the relative errors, with alpha and 1 / bandwidth not below 0.

    Raises:
        ValueError: for points of fewer than two sizes.
    """
    if len({p.size_bytes / max(p.messages, 1) for p in points}) < 2:
        raise ValueError("a fit needs points of two sizes or more")
    rows = np.array([[p.messages / p.seconds, p.size_bytes / p.seconds] for p in points])
    scale = np.linalg.norm(rows, axis=0)  # the columns differ by many orders of magnitude
    ones = np.ones(len(rows))
    both = np.linalg.lstsq(rows / scale, ones, rcond=None)[0] / scale
    if both.min() < 0:  # then one is 0, the other alone serves better or worse
        alone = [float(column.sum() / (column @ column)) for column in rows.T]
        corners = [np.array([alone[0], 0.0]), np.array([0.0, alone[1]])]
        both = min(corners, key=lambda corner: float(np.square(rows @ corner - 1).sum()))
    errors = rows @ both - 1
    bandwidth = 1 / float(both[1]) if both[1] > 0 else math.inf
    return Fit(
        Link(float(both[0]), bandwidth),
        float(np.sqrt(np.square(errors).mean())),
        float(np.abs(errors).max()),
    )


def predict(link: Link, n: int, values_bytes: int) -> dict[str, float]:
    """Seconds of an exchange by messages on each graph of ``n`` nodes, and of an Allreduce.

    Args:
        values_bytes: what an agent publishes, and what an Allreduce would sum.
    """
    hops = (n - 1).bit_length()
    degrees = {"ring": min(n - 1, 2), "exponential": hops, "complete": n - 1}
    if n >= 4 and (torus := torus_degree(n)):
        degrees["torus"] = torus
    message = HEADER_BYTES + padded(values_bytes)
    seconds = {name: link.seconds(degree, degree * message) for name, degree in degrees.items()}
    # A token to every agent of the union graph, and when all have come, values to one.
    peers = len({side for i in range(hops) for side in (1 << i, n - (1 << i))})
    one_peer = HEADER_BYTES * peers + (padded(values_bytes) if hops else 0)
    seconds["one-peer exponential"] = link.seconds(peers + min(hops, 1), one_peer)
    seconds[ALLREDUCE] = min(allreduce(link, n, values_bytes).values())
    return seconds


def torus_degree(n: int) -> int:
    """Of the most square torus; 0 for a prime. Rows or columns of two wrap onto the same edge."""
    rows = next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)
    return 0 if rows == 1 else sum(min(side - 1, 2) for side in (rows, n // rows))


def allreduce(link: Link, n: int, size_bytes: int) -> dict[str, float]:
    """Seconds by the usual algorithms; an MPI library takes the best for the size.

    Source: Thakur, Rabenseifner, Gropp 2005.
    """
    steps = (n - 1).bit_length()
    both_ways = 2 * (n - 1) / n * size_bytes
    return {
        "ring": link.seconds(2 * (n - 1), both_ways),
        "recursive doubling": link.seconds(steps, steps * size_bytes),
        "halving and doubling": link.seconds(2 * steps, both_ways),
    }

"""The bench's model: a fit finds the link it was made with, predictions keep their relations."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpicdsgd.kernels.arena import Arena

sys.path.insert(0, str(Path(__file__).parents[3] / "bench"))
import scaling_model as theory

SIZES = [4**k for k in range(5, 12)]

alphas = st.floats(1e-7, 1e-2)
bandwidths = st.floats(1e6, 1e12)
links = st.builds(theory.Link, alphas, bandwidths)
values = st.integers(0, 10**9)
many = st.sampled_from([3, 5, 16, 64, 100, 1024, 4096])


def points(link: theory.Link, messages: int, factors: list[float]) -> list[theory.Point]:
    sizes = [messages * (64 + 4 * n) for n in SIZES]
    return [
        theory.Point(messages, size, factor * link.seconds(messages, size))
        for size, factor in zip(sizes, factors, strict=True)
    ]


@given(links, st.integers(1, 4))
def test_the_fit_finds_the_link(link: theory.Link, messages: int) -> None:
    found = theory.fit(points(link, messages, [1.0] * len(SIZES)))
    assert found.link.alpha_s == pytest.approx(link.alpha_s, rel=1e-4)
    assert found.link.bandwidth == pytest.approx(link.bandwidth, rel=1e-4)
    assert found.rms <= found.worst < 1e-6


@given(links, st.lists(st.floats(0.9, 1.1), min_size=len(SIZES), max_size=len(SIZES)))
def test_noise_leaves_no_more_residual_than_the_true_link_has(
    link: theory.Link, factors: list[float]
) -> None:
    noisy = points(link, 2, factors)
    found = theory.fit(noisy)
    true = [link.seconds(2, p.size_bytes) / p.seconds - 1 for p in noisy]
    assert found.rms <= math.sqrt(sum(e * e for e in true) / len(true)) + 1e-9
    assert found.link.alpha_s >= 0
    assert found.link.bandwidth > 0


def test_a_fit_has_no_negative_part() -> None:
    falling = [theory.Point(1, size, 1 / size) for size in (100, 1000, 10_000)]
    found = theory.fit(falling)  # the best line falls
    assert (found.link.alpha_s > 0, found.link.bandwidth) == (True, math.inf)
    steep = [theory.Point(1, size, size**2 * 1e-9) for size in (100, 1000, 10_000)]
    assert theory.fit(steep).link.alpha_s == 0


def test_one_size_is_no_fit() -> None:
    with pytest.raises(ValueError, match="two sizes"):
        theory.fit([theory.Point(1, 64, 1.0), theory.Point(2, 128, 2.0)])


@given(links, values, many, many)
def test_what_does_not_grow_with_the_number_of_agents(
    link: theory.Link, size: int, n: int, more: int
) -> None:
    few, all_ = theory.predict(link, n, size), theory.predict(link, more, size)
    assert few["ring"] == all_["ring"]
    assert few["complete"] * (more - 1) == pytest.approx(all_["complete"] * (n - 1))
    assert few["complete"] == pytest.approx(few["ring"] * (n - 1) / 2)
    hops = math.ceil(math.log2(n))
    assert few["exponential"] == pytest.approx(few["ring"] * hops / 2)
    if math.isqrt(n) ** 2 == n and n > 4:
        assert few["torus"] == pytest.approx(2 * few["ring"])


@given(st.floats(1e6, 1e12), values, many)
def test_without_latency_one_peer_and_allreduce_cost_their_bytes(
    bandwidth: float, size: int, n: int
) -> None:
    seconds = theory.predict(theory.Link(0.0, bandwidth), n, size)
    peers = 2 * math.log2(n) - 1 if n & (n - 1) == 0 else 2 * math.ceil(math.log2(n))
    one_peer = seconds["one-peer exponential"] * bandwidth
    assert theory.padded(size) + 64 * min(2, peers) <= one_peer + 1e-3
    assert one_peer <= theory.padded(size) + 64 * peers + 1e-3
    assert seconds["Allreduce"] * bandwidth == pytest.approx(2 * (n - 1) / n * size)


@given(links, values, many)
def test_the_best_allreduce_is_taken(link: theory.Link, size: int, n: int) -> None:
    ways = theory.allreduce(link, n, size)
    assert theory.predict(link, n, size)["Allreduce"] == min(ways.values())
    assert ways["ring"] >= ways["halving and doubling"]


@given(links, values)
def test_one_agent_exchanges_nothing(link: theory.Link, size: int) -> None:
    assert set(theory.predict(link, 1, size).values()) == {0.0}


@given(st.lists(st.integers(0, 200), max_size=8), st.sampled_from(list(theory.WIRE_BYTES)))
def test_elements_are_the_arena_s(lengths: list[int], wire: str) -> None:
    size = theory.elements(lengths)
    assert size == Arena([torch.zeros(n) for n in lengths]).size
    ring = theory.Place(2, 2, 2, 2, 2, tokens=False, shared=False)
    found = theory.sent(ring, size, wire)
    blocks = math.ceil(size * theory.WIRE_BYTES[wire] / 64)
    assert found == theory.Sent(2 * (64 + 64 * blocks), 2, 2 * (64 + 64 * blocks))


@given(st.integers(0, 8), st.integers(0, 8), st.integers(1, 10**6))
def test_where_values_go_by_messages_a_neighbour_costs_a_copy(
    sources: int, far: int, size: int
) -> None:
    far = min(sources, far)
    in_place = theory.Place(sources, sources, sources, far, far, tokens=True, shared=True)
    messages = theory.Place(sources, sources, sources, sources, sources, False, False)
    values = theory.padded(4 * size)
    near = theory.memory(in_place, [size], "float32")
    apart = theory.memory(messages, [size], "float32")
    assert near["published"] == 2 * values + 64
    assert near["received"] == 64 * (1 + sources) + far * values
    assert apart["published"] + apart["received"] == (1 + sources) * (64 + values)
    assert theory.sent(in_place, size, "float32").messages == sources + far
    same = ("parameters", "gradients", "momentum", "look-ahead", "rounds")
    assert [near[k] for k in same] == [values, 4 * size, values, 0, 0]
    more = theory.memory(in_place, [size], "float32", look_ahead=True, rounds=2, momentum=False)
    assert [more[k] for k in same] == [values, 4 * size, 0, values, values]


def test_networks_are_what_their_names_say() -> None:
    assert theory.NETWORKS["hdr100"] == theory.Link(2e-6, 12.5e9)
    assert np.isfinite([link.seconds(1, 1) for link in theory.NETWORKS.values()]).all()

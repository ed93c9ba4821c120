"""The order of samples."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicdsgd.common.errors import UserError
from mpicdsgd.data import Shuffler


@st.composite
def settings_of_a_run(draw):
    shares = tuple(draw(st.lists(st.integers(1, 60), min_size=1, max_size=5)))
    return (
        shares,
        draw(st.integers(1, min(shares))),
        draw(st.integers(0, 2**40)),
        draw(st.booleans()),
    )


@settings(deadline=None)
@given(run=settings_of_a_run(), epoch=st.integers(0, 10**6))
def test_an_epoch(run, epoch):
    shares, batch_size, seed, drop_last = run
    largest = max(shares)
    taken = largest - (largest % batch_size if drop_last else 0)
    sizes = []
    for rank, share in enumerate(shares):
        shuffler = Shuffler(shares, rank, batch_size, seed, drop_last)
        batches = list(shuffler.batches(epoch))
        assert len(batches) == shuffler.steps_per_epoch == -(-taken // batch_size)
        assert all(len(set(batch.tolist())) == len(batch) for batch in batches)
        sizes.append([len(batch) for batch in batches])
        # Every sample floor(taken / share) times, and once more the first of the permutation.
        counts = Counter(np.concatenate(batches).tolist())
        repeated = set(shuffler.permutation(epoch)[: taken % share].tolist())
        assert (
            counts
            == Counter({i: taken // share + (i in repeated) for i in range(share)}) - Counter()
        )
    assert all(size == sizes[0] for size in sizes)  # the same on all agents


@settings(deadline=None)
@given(run=settings_of_a_run(), epoch=st.integers(0, 50), data=st.data())
def test_any_step_can_be_started_at(run, epoch, data):
    shares, batch_size, seed, drop_last = run
    shuffler = Shuffler(shares, 0, batch_size, seed, drop_last)
    start = data.draw(st.integers(0, shuffler.steps_per_epoch))
    rest = list(Shuffler(shares, 0, batch_size, seed, drop_last).batches(epoch, start))
    expected = list(islice(shuffler.batches(epoch), start, None))
    assert len(rest) == len(expected)
    assert all((a == b).all() for a, b in zip(rest, expected, strict=True))


def test_the_order_is_the_documented_generator():
    expected = np.random.Generator(np.random.PCG64([5, 1, 9])).permutation(7)
    np.testing.assert_array_equal(
        np.concatenate(list(Shuffler((7, 7), 1, 3, seed=5).batches(9))), expected
    )


def test_epochs_agents_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(Shuffler((50, 50), rank, 5, seed).permutation(epoch).tolist())
        for rank in (0, 1)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 8


@pytest.mark.parametrize(
    ("shares", "batch_size", "seed", "message"),
    [
        ((1, 0, 0), 1, 0, "1 training samples are too few for 3 agents"),
        ((5, 0, 5), 1, 0, "agent 1 has no training samples"),
        (
            (9, 4, 9),
            5,
            0,
            "batch_size = 5 is larger than the share of agent 1, 4 samples: .* most 4",
        ),
        ((9, 9), 0, 0, "must be at least 1"),
        ((9, 9), 1, -1, "must not be negative"),
    ],
)
def test_bad_settings(shares, batch_size, seed, message):
    with pytest.raises(UserError, match=message):
        Shuffler(shares, 0, batch_size, seed)

"""Who gets which samples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicdsgd.common.errors import UserError
from mpicdsgd.data import partition


@settings(deadline=None)
@given(
    spec=st.sampled_from(["iid", "contiguous", "by-class", "dirichlet:0.3", "dirichlet:100"]),
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    n_agents=st.integers(1, 8),
    seed=st.integers(0, 2**70),
)
def test_every_sample_goes_to_exactly_one_agent(spec, labels, n_agents, seed):
    labels = np.array(labels)
    try:
        shares = partition(spec, labels, n_agents, 6, seed)
    except UserError:
        # Only where some agent must or may remain without samples.
        assert len(labels) < n_agents or spec.startswith(("by-class", "dirichlet"))
        return
    assert len(shares) == n_agents
    assert all(len(share) > 0 and (np.diff(share) > 0).all() for share in shares)
    np.testing.assert_array_equal(np.sort(np.concatenate(shares)), np.arange(len(labels)))
    again = partition(spec, labels, n_agents, 6, seed)
    assert all((a == b).all() for a, b in zip(shares, again, strict=True))


@settings(deadline=None)
@given(n=st.integers(1, 100), n_agents=st.integers(1, 20), seed=st.integers(0, 100))
def test_iid_and_contiguous_need_no_labels_and_are_balanced(n, n_agents, seed):
    if n < n_agents:
        with pytest.raises(UserError, match=f"{n} training samples are too few for {n_agents}"):
            partition("iid", n, n_agents, None, seed)
        return
    for spec in ("iid", "contiguous"):
        sizes = [len(share) for share in partition(spec, n, n_agents, None, seed)]
        assert sum(sizes) == n
        assert max(sizes) - min(sizes) <= 1


def test_iid_shuffles_and_depends_on_the_seed():
    first, second = (partition("iid", 1000, 2, None, seed)[0] for seed in (0, 1))
    assert not np.array_equal(first, np.arange(500))
    assert not np.array_equal(first, second)


def test_contiguous_keeps_the_order():
    assert [s.tolist() for s in partition("contiguous", 5, 2, None, 0)] == [[0, 1, 2], [3, 4]]


def test_by_class_as_the_authors():
    labels = np.tile(np.arange(10), 3)
    own = [sorted(set(labels[s].tolist())) for s in partition("by-class", labels, 5, 10, 0)]
    assert own == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_by_class_deals_the_remaining_classes_to_the_first_agents():
    labels = np.tile(np.arange(10), 3)
    own = [sorted(set(labels[s].tolist())) for s in partition("by-class", labels, 4, 10, 0)]
    assert own == [[0, 1, 8], [2, 3, 9], [4, 5], [6, 7]]


def test_dirichlet_concentrates_when_alpha_is_small():
    labels = np.repeat(np.arange(10), 200)

    def largest_class(spec):
        shares = partition(spec, labels, 5, 10, 0)
        return np.mean([np.bincount(labels[s]).max() / len(s) for s in shares])

    assert largest_class("dirichlet:0.05") > 0.35
    assert largest_class("dirichlet:1000") < 0.13


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("iidd", "did you mean iid"),
        ("", "iid, contiguous, by-class or dirichlet:ALPHA"),
        ("iid:3", "takes no argument"),
        ("dirichlet", "needs a number"),
        ("dirichlet:x", "needs a number"),
        ("dirichlet:0", "needs a number"),
        ("dirichlet:-1", "needs a number"),
        ("dirichlet:nan", "needs a number"),
        ("dirichlet:inf", "needs a number"),
        ("dirichlet:1e-6", "left an agent without samples in 100 draws"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(UserError, match=message):
        partition(spec, np.zeros(40, np.int64), 4, 10, 0)


def test_by_class_with_more_agents_than_classes_or_a_class_without_samples():
    with pytest.raises(UserError, match=r"at most as many agents as classes \(3\), got 4"):
        partition("by-class", np.arange(12) % 3, 4, 3, 0)
    with pytest.raises(UserError, match="leaves agent 1 without samples: none are of class 2, 3"):
        partition("by-class", np.array([0, 1, 1]), 2, 4, 0)


@pytest.mark.parametrize("spec", ["by-class", "dirichlet:1"])
def test_labels_are_needed(spec):
    with pytest.raises(UserError, match="needs class labels"):
        partition(spec, 10, 2, None, 0)

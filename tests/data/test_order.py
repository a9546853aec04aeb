"""Batches as a function of their number: every example once per epoch, whatever the number of hosts."""

import itertools
import sys

import numpy as np
import pytest

from diffrl.data.order import Order


def order(size=10, batch_size=4, *, seed=0, shuffle=True, epochs=None, drop=True, flip=False, host=0, hosts=1):
    return Order(size, batch_size, seed, shuffle, epochs, drop, flip, host, hosts)


def stream(o: Order, steps: int) -> np.ndarray:
    return np.concatenate([o[i].indices for i in range(steps)])


@pytest.mark.parametrize("batch_size", [1, 4, 7, 10, 25])
def test_every_epoch_is_another_permutation(batch_size):
    n = 10
    epochs = stream(order(n, batch_size), 5 * n)[: 5 * n].reshape(5, n)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n), (5, 1)))
    assert len({tuple(e) for e in epochs}) == 5
    # The order does not depend on how it is cut into batches.
    np.testing.assert_array_equal(epochs.ravel(), stream(order(n, 5), 10))


def test_seeds_differ_and_repeat():
    first, again, other = (stream(order(100, seed=s), 25) for s in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_permutations_are_uniform():
    """All 24 orders of four examples, equally often: chi-squared with 23 degrees of freedom, 99.9 % below 49.7."""
    epochs = stream(order(4, 4), 4800).reshape(-1, 4)
    _, counts = np.unique(epochs, axis=0, return_counts=True)
    assert len(counts) == 24
    assert np.sum((counts - 200) ** 2 / 200) < 49.7


def test_without_shuffling_the_order_is_that_of_the_set():
    np.testing.assert_array_equal(stream(order(5, 3, shuffle=False), 4), [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_batch_of_a_single_host(hosts):
    shares = [order(batch_size=8, flip=True, host=h, hosts=hosts) for h in range(hosts)]
    for step in range(12):
        whole = order(batch_size=8, flip=True)[step]
        np.testing.assert_array_equal(np.concatenate([s[step].indices for s in shares]), whole.indices)
        np.testing.assert_array_equal(np.concatenate([s[step].flip for s in shares]), whole.flip)


@pytest.mark.parametrize(("drop", "lengths"), [(True, [4] * 7), (False, [4] * 7 + [2])])
def test_the_last_batch_of_finite_data(drop, lengths):
    finite = order(10, 4, epochs=3, drop=drop)
    assert [len(finite[i].indices) for i in range(len(finite))] == lengths
    np.testing.assert_array_equal(stream(finite, len(finite)), stream(order(10, 4), 8)[: sum(lengths)])


def test_an_incomplete_batch_is_shared_by_all_hosts():
    hosts = [order(9, 6, epochs=1, drop=False, host=h, hosts=2) for h in range(2)]
    assert [len(o) for o in hosts] == [2, 2]
    seen = itertools.chain.from_iterable(o[step].indices for o in hosts for step in range(2))
    assert sorted(seen) == list(range(9))


def test_repeating_has_no_end_and_any_batch_can_be_had_at_once():
    endless = order(10, 5, flip=True)
    assert len(endless) == sys.maxsize
    halves = [endless[10**12 + i].indices for i in range(2)]  # far beyond what could be iterated
    assert sorted(np.concatenate(halves)) == list(range(10))


def test_half_of_the_images_are_flipped():
    flips = np.concatenate([order(batch_size=100, flip=True)[i].flip for i in range(100)])
    assert abs(flips.mean() - 0.5) < 0.02  # four standard deviations
    assert order()[0].flip is None

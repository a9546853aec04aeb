"""Prefetching changes nothing that is seen: not the batches, not the state, not the moment of an error."""

import itertools
import json

import jax
import numpy as np
import pytest

from diffrl.data import pipeline
from diffrl.data.prefetch import Prefetch
from diffrl.data.source import from_arrays
from diffrl.errors import UserError

IMAGES = from_arrays(np.random.default_rng(0).integers(0, 256, (10, 4, 4, 1), dtype=np.uint8), np.arange(10))


def make(size=2, inner=1, put=jax.device_put, **kwargs):
    return Prefetch(pipeline.loader(IMAGES, 4, seed=1, flip=True, **kwargs), put, size=size, inner=inner)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("size", [0, 1, 5])
def test_items_are_the_batches_on_the_device(size):
    plain = pipeline.loader(IMAGES, 4, seed=1, flip=True)
    for item, batch in zip(itertools.islice(make(size), 6), plain, strict=False):
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(item))
        assert_same(item, batch)


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("stop", [0, 2, 5])
def test_resumes_after_the_last_consumed_item(inner, stop):
    first = make(inner=inner)
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    assert state == {"step": stop * inner}  # not what lies in the queue
    expected = list(itertools.islice(first, 6))  # 2.5 batches per epoch: epochs end within batches, and within stacks

    second = make(size=1, inner=inner)
    next(second)
    second.set_state(state)
    assert second.get_state() == state
    for a, b in zip(expected, itertools.islice(second, 6), strict=True):
        assert_same(a, b)


def test_inner_batches_are_stacked():
    stacked = next(make(inner=3))
    assert stacked["x"].shape == (3, 4, 4, 4, 1)
    assert_same(stacked, jax.tree.map(lambda *b: np.stack(b), *itertools.islice(make(), 3)))


def test_size_items_are_ready_beyond_the_one_in_hand():
    placed = []
    items = make(size=2, put=lambda batch: placed.append(batch) or batch)
    assert placed == []
    next(items)
    assert len(placed) == 3
    next(items)
    assert len(placed) == 4


def test_finite_data_end_after_the_queue_is_empty():
    items = make(size=8, epochs=2)
    assert len(list(items)) == 5
    with pytest.raises(StopIteration):
        next(items)
    items.set_state({"step": 4})
    assert len(list(items)) == 1
    assert len(list(make(inner=2, epochs=2))) == 2  # the fifth batch alone makes no stack


def test_a_failure_waits_for_the_good_items_before_it():
    def fetch(indices):
        if 9 in indices:
            raise UserError("cannot read 9.png")
        return IMAGES.fetch(indices)

    source = IMAGES._replace(fetch=fetch)
    items = Prefetch(pipeline.loader(source, 2, shuffle=False), jax.device_put, size=8)
    assert [next(items)["label"].tolist() for _ in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(UserError, match="cannot read 9"):
        next(items)
    assert items.get_state() == {"step": 4}


def test_close_ends_the_loader_which_can_start_again():
    items = make()
    first = next(items)
    items.close()
    items.set_state({"step": 0})
    assert_same(next(items), first)
    items.close()

"""Toy sets against what their definitions say of them."""

import numpy as np
import pytest

from diffrl.data import toy
from diffrl.errors import UserError


def points(name, split="train"):
    source = toy.toy(name, split, length=20_000)
    return source, source.fetch(np.arange(source.length))


@pytest.mark.parametrize("name", sorted(toy.SETS))
def test_every_set_is_reproducible_and_of_unit_scale(name):
    source, batch = points(name)
    x = batch["x"]
    assert (x.shape, x.dtype, source.shape) == ((20_000, 2), np.float32, (2,))
    assert np.abs(x).max() < 1.15
    assert np.all(np.abs(x.mean(axis=0)) < 0.2)
    np.testing.assert_array_equal(points(name)[1]["x"], x)
    assert not np.isin(points(name, "test")[1]["x"][:, 0], x[:, 0]).mean() > 0.01
    assert ("label" in batch) == (name != "swiss_roll") == (source.num_classes is not None)


@pytest.mark.parametrize(
    ("name", "means", "std"),
    [("eight_gaussians", toy.ring_means(), toy.RING_STD), ("grid", toy.grid_means(), toy.GRID_STD)],
)
def test_mixtures_have_the_moments_that_they_give(name, means, std):
    _, batch = points(name)
    counts = np.bincount(batch["label"], minlength=len(means))
    assert np.all(np.abs(counts * len(means) / 20_000 - 1) < 0.2)
    for k, mean in enumerate(means):
        x = batch["x"][batch["label"] == k]
        np.testing.assert_allclose(x.mean(axis=0), mean, atol=5 * std / np.sqrt(len(x)))
        np.testing.assert_allclose(x.std(axis=0), std, rtol=0.12)


def test_ring_and_grid_lie_where_they_should():
    np.testing.assert_allclose(np.linalg.norm(toy.ring_means(), axis=1), 0.8)
    assert len(np.unique(toy.grid_means().round(9), axis=0)) == 25
    np.testing.assert_allclose(np.unique(toy.grid_means().round(9)), [-0.8, -0.4, 0, 0.4, 0.8])


def test_checkerboard_is_uniform_on_every_other_square():
    x = points("checkerboard")[1]["x"]
    cells = np.floor((x + 1) * 2).astype(int).clip(0, 3)
    counts = np.zeros((4, 4), int)
    np.add.at(counts, tuple(cells.T), 1)
    board = np.indices((4, 4)).sum(axis=0) % 2 == 0
    assert np.all(counts[~board] == 0)
    np.testing.assert_allclose(counts[board], 2500, rtol=0.08)


def test_swiss_roll_is_a_spiral():
    """Radius is proportional to the angle, modulo whole turns: r 4.5 pi / 0.95 = angle + 2 pi k."""
    x = points("swiss_roll")[1]["x"].astype(float)
    turns = np.hypot(*x.T) * 4.5 / 0.95 / 2 - np.arctan2(x[:, 1], x[:, 0]) / (2 * np.pi)
    assert np.mean(np.abs(turns - turns.round())) < 0.06


def test_moons_interleave_under_a_half_turn():
    _, batch = points("moons")
    upper, lower = (batch["x"][batch["label"] == k] for k in range(2))
    np.testing.assert_allclose(upper.mean(axis=0), -lower.mean(axis=0), atol=0.02)
    np.testing.assert_allclose(np.hypot(upper[:, 0] + 0.3, upper[:, 1] + 0.15), 0.6, atol=0.2)


def test_pinwheel_has_a_symmetry_of_order_five():
    _, batch = points("pinwheel")
    centres = np.array([batch["x"][batch["label"] == k].mean(axis=0) for k in range(5)]) @ np.array([1, 1j])
    np.testing.assert_allclose(centres / centres[0], np.exp(2j * np.pi * np.arange(5) / 5), atol=0.05)


def test_unknown_names_and_splits():
    with pytest.raises(UserError, match="no toy set 'rings': choose one of checkerboard"):
        toy.toy("rings")
    with pytest.raises(UserError, match="toy:grid has no split 'all'"):
        toy.toy("grid", "all")

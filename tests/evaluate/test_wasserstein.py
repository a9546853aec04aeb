"""Sliced Wasserstein distance: scipy's on a line, translations and Gaussians by hand."""

import numpy as np
import pytest
import scipy.stats

from diffrl.errors import UserError
from diffrl.evaluate.wasserstein import sliced_wasserstein

RNG = np.random.default_rng(0)


def test_on_a_line_it_is_scipys():
    x, y = RNG.normal(size=(500, 1)), RNG.exponential(size=(500, 1))
    expected = scipy.stats.wasserstein_distance(x[:, 0], y[:, 0])
    assert sliced_wasserstein(x, y) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("dimension", "mean_cosine"), [(2, 2 / np.pi), (3, 0.5)])
def test_of_a_translation(dimension, mean_cosine):
    """|<direction, shift>| on average over the sphere; the order of the points does not matter."""
    x = RNG.normal(size=(100, dimension))
    shift = np.zeros(dimension)
    shift[0] = 3.0
    assert sliced_wasserstein(x, RNG.permutation(x) + shift, 20_000) == pytest.approx(3.0 * mean_cosine, rel=0.02)


def test_of_equal_clouds_it_is_zero_and_of_samples_it_is_not():
    x, y = RNG.normal(size=(2, 1000, 2))
    assert sliced_wasserstein(x, x[::-1]) == 0.0
    assert 0.0 < sliced_wasserstein(x, y) < 0.1


def test_sizes_must_agree():
    with pytest.raises(UserError, match=r"\(3, 2\) and \(4, 2\)"):
        sliced_wasserstein(np.zeros((3, 2)), np.zeros((4, 2)))

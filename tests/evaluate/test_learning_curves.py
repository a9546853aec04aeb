"""Interquartile means by hand, and the bootstrap where its distribution is known: of zeros and ones."""

import numpy as np
import pytest
import scipy.stats
from matplotlib.figure import Figure

from diffrl.evaluate import learning_curves


def test_the_interquartile_mean_by_hand():
    """Of eight the two lowest and highest are dropped, of five one each, of three none."""
    eight = [100.0, 3.0, 1.0, 5.0, -50.0, 2.0, 6.0, 4.0]
    np.testing.assert_allclose(learning_curves.interquartile_mean([eight, eight[::-1]]), [3.5, 3.5])
    assert learning_curves.interquartile_mean([9, -70, 1, 2, 3]) == pytest.approx(2)
    assert learning_curves.interquartile_mean([0, 0, 6]) == pytest.approx(2)


def test_the_interval_of_zeros_and_ones_is_a_binomials():
    """Of 16 draws, k of them ones, the four lowest and highest go: (k - 4) / 8 within [0, 1], k binomial."""
    ones = np.array([0, 3, 5, 6, 8, 10, 13, 16])
    scores = np.random.default_rng(0).permuted(np.arange(16) < ones[:, None], axis=1).astype(float)
    found = learning_curves.estimate(scores, resamples=10_000)
    low, high = (np.clip((scipy.stats.binom.ppf(q, 16, ones / 16) - 4) / 8, 0, 1) for q in (0.025, 0.975))
    np.testing.assert_allclose(found.mean, np.clip((ones - 4) / 8, 0, 1))
    np.testing.assert_allclose(found.low, low)
    np.testing.assert_allclose(found.high, high)


def test_one_seed_has_no_interval():
    found = learning_curves.estimate([[1.0], [2.0]])
    for values in found:
        np.testing.assert_array_equal(values, [1, 2])


def test_an_estimate_is_its_seeds():
    scores = np.random.default_rng(0).normal(size=(3, 10))
    first, again, other = (learning_curves.estimate(scores, 200, seed) for seed in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(first.mean, other.mean)
    assert (first.low != other.low).all()


def test_a_line_is_drawn_at_the_means():
    axes = Figure().subplots()
    curve = learning_curves.Curve([10, 20], [[1.0, 1.0, 4.0], [5.0, 5.0, 5.0]])
    learning_curves.draw(axes, {"one": curve}, threshold=3.0)
    line, threshold = axes.get_lines()
    np.testing.assert_allclose(line.get_xydata(), [[10, 2], [20, 5]])
    np.testing.assert_array_equal(threshold.get_ydata(), [3, 3])

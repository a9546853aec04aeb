"""Precision and recall by hand, by brute force, in their limits; the spread within classes; errors."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from diffrl.errors import UserError
from diffrl.evaluate import precision_recall as pr


def column(*values):
    return np.array(values, float)[:, None]


def test_by_hand():
    """On a line with k = 1.

    Real 0, 1, 3, 10 reach 1, 1, 2, 7; of the fakes 2.5, 4, 17, 18 the last alone lies outside.  Fakes reach 1.5, 1.5,
    1, 1: 1 and 3 are within the reach of 2.5, 1 just so; 0 and 10 are within none.
    """
    real, fake = column(0, 1, 3, 10), column(2.5, 4, 17, 18)
    np.testing.assert_array_equal(pr.radii(real, 1), [1, 1, 2, 7])
    np.testing.assert_array_equal(pr.radii(real, 2), [3, 2, 3, 9])
    np.testing.assert_array_equal(pr.radii(fake, 1), [1.5, 1.5, 1, 1])
    assert pr.precision_recall(real, fake, k=1) == (0.75, 0.5)


def brute_force(real, fake, k):
    def manifold(points):
        def distance(a, b):
            return float(np.sqrt(sum((a - b) ** 2)))

        reach = [sorted(distance(a, b) for j, b in enumerate(points) if j != i)[k - 1] for i, a in enumerate(points)]
        return lambda x: any(distance(x, a) <= r for a, r in zip(points, reach, strict=True))

    inside_real, inside_fake = manifold(real), manifold(fake)
    return np.mean([inside_real(x) for x in fake]), np.mean([inside_fake(x) for x in real])


@pytest.mark.parametrize("block", [7, 1000])
def test_brute_force_in_any_blocks(monkeypatch, block):
    monkeypatch.setattr(pr, "BLOCK", block)
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(40, 3)), 0.8 * rng.normal(size=(30, 3)) + 1.2
    expected = brute_force(real, fake, 3)
    assert pr.precision_recall(real, fake) == pytest.approx(expected)
    assert 0.1 < expected[1] < expected[0] < 1.0


def test_radii_of_another_library():
    x = np.random.default_rng(1).normal(size=(1500, 5))
    distances, _ = NearestNeighbors(n_neighbors=4).fit(x).kneighbors(x)  # the first neighbour is the point itself
    np.testing.assert_allclose(pr.radii(x, 3), distances[:, 3], rtol=1e-9)


def test_limits():
    """The same set, disjoint sets, one mode of two, and both made by exchanging the roles."""
    rng = np.random.default_rng(2)
    left, right = rng.normal(size=(200, 2)), rng.normal(size=(200, 2)) + 50
    both = np.concatenate([left, right])
    assert pr.precision_recall(both, both) == (1.0, 1.0)
    assert pr.precision_recall(left, right) == (0.0, 0.0)
    precision, recall = pr.precision_recall(both, rng.normal(size=(200, 2)))
    assert precision > 0.9
    assert 0.4 < recall <= 0.5
    assert pr.precision_recall(right, both) == pr.precision_recall(both, right)[::-1]


def test_copies_of_one_image():
    """All fakes equal: their balls have radius 0, and still each lies in its own."""
    real, fake = column(0, 1, 2, 3, 4), np.full((5, 1), 2.0)
    assert pr.precision_recall(real, fake) == (1.0, 0.2)


def test_spread_by_hand():
    """Class 0 has the distances 3, 4 and 5, mean 4; class 1 has 2; a class of one has none."""
    x = np.array([[0, 0], [3, 0], [0, 4], [7, 7], [7, 9], [1, 1]])
    labels = np.array([0, 0, 0, 1, 1, 2])
    assert pr.spread(x, labels) == pytest.approx(3.0)
    assert pr.spread(x.reshape(6, 2, 1, 1), labels) == pytest.approx(3.0)


def test_errors_are_one_line():
    good = np.eye(5)
    cases = [
        (lambda: pr.precision_recall(good, np.eye(6)), "5 and 6 features"),
        (lambda: pr.precision_recall(good, good[:3]), "3 nearest neighbours"),
        (lambda: pr.precision_recall(good, np.full((5, 5), np.nan)), "not finite"),
        (lambda: pr.precision_recall(good, np.ones(5)), "shape"),
        (lambda: pr.spread(good, np.arange(5)), "two of one class"),
    ]
    for call, text in cases:
        with pytest.raises(UserError, match=text) as error:
            call()
        assert "\n" not in str(error.value)

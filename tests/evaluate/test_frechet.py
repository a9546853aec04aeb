"""Fréchet distance against closed forms, scipy's matrix square root, and its invariances."""

import numpy as np
import pytest
import scipy.linalg

from diffrl.errors import UserError
from diffrl.evaluate import frechet


def gaussian(mean, covariance, count=1000):
    """Moments whose mean and unbiased covariance are exactly these."""
    covariance = np.asarray(covariance, np.float64)
    return frechet.Moments(count, np.asarray(mean, np.float64), covariance * (count - 1))


def random_spd(rng, dim):
    a = rng.normal(size=(dim, 2 * dim))
    return a @ a.T / dim


def of(features):
    return frechet.moments(lambda x: x, [features])


def test_closed_form_of_commuting_covariances():
    """In a common eigenbasis the distance is |mu|² + sum (sqrt(a) - sqrt(b))²."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    a, b = np.array([4.0, 9.0, 1.0]), np.array([1.0, 25.0, 0.0])
    distance = frechet.frechet_distance(
        gaussian(q @ [1, 2, 3], q @ np.diag(a) @ q.T), gaussian(q @ [1, 0, 3], q @ np.diag(b) @ q.T)
    )
    assert distance == pytest.approx(4 + (1 + 4 + 1), abs=1e-6)  # one eigenvalue is 0: sqrt(eps) is the accuracy


def test_against_scipy_matrix_square_root():
    rng = np.random.default_rng(1)
    for dim in (2, 7, 30):
        a, b = random_spd(rng, dim), random_spd(rng, dim)
        mu = rng.normal(size=dim)
        expected = mu @ mu + np.trace(a + b) - 2 * np.trace(scipy.linalg.sqrtm(a @ b)).real
        measured = frechet.frechet_distance(gaussian(mu, a), gaussian(np.zeros(dim), b))
        assert measured == pytest.approx(expected, rel=1e-9)


def test_singular_covariances():
    """Ten samples in fifty dimensions: zero to itself, and orthogonal supports share no cross term."""
    features = np.random.default_rng(2).normal(size=(10, 25))
    left = of(np.concatenate([features, np.zeros_like(features)], axis=1))
    right = of(np.concatenate([np.zeros_like(features), features], axis=1))
    assert frechet.frechet_distance(left, left) == pytest.approx(0.0, abs=1e-10)
    mean = features.mean(axis=0)
    expected = 2 * mean @ mean + 2 * np.cov(features.T).trace()
    assert frechet.frechet_distance(left, right) == pytest.approx(expected, rel=1e-7)


def test_streaming_equals_numpy_far_from_the_origin():
    features = np.random.default_rng(3).normal(size=(1000, 5)) @ np.diag([1, 2, 3, 4, 5]) + 1e4
    streamed = frechet.moments(lambda x: x, np.split(features, [1, 10, 500, 500, 999]))
    assert streamed.n == 1000
    np.testing.assert_allclose(streamed.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(streamed.covariance, np.cov(features.T), rtol=1e-10, atol=1e-10)


def test_merge_is_associative_with_a_neutral_element():
    parts = [of(np.random.default_rng(i).normal(size=(3 + i, 4)) + i) for i in range(3)]
    left = frechet.merge(frechet.merge(parts[0], parts[1]), parts[2])
    right = frechet.merge(parts[0], frechet.merge(parts[1], parts[2]))
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(frechet.merge(frechet.Moments.empty(4), parts[0]), parts[0], strict=True):
        np.testing.assert_array_equal(a, b)


def test_invariances():
    """Common shifts and orthogonal maps change nothing; a map by c scales d² by c²; d is symmetric."""
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(60, 6)), rng.normal(size=(80, 6)) * 1.7 + 0.3
    q, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    base = frechet.frechet_distance(of(x), of(y))
    assert frechet.frechet_distance(of(y), of(x)) == pytest.approx(base, rel=1e-10)
    assert frechet.frechet_distance(of(x + 7), of(y + 7)) == pytest.approx(base, rel=1e-9)
    assert frechet.frechet_distance(of(x @ q), of(y @ q)) == pytest.approx(base, rel=1e-9)
    assert frechet.frechet_distance(of(3 * x), of(3 * y)) == pytest.approx(9 * base, rel=1e-9)


def test_errors_are_one_line():
    two, three = of(np.eye(2)), of(np.eye(3))
    cases = [
        (lambda: frechet.frechet_distance(two, three), "2 and of 3 features"),
        (lambda: frechet.merge(two, three), "2 and of 3 features"),
        (lambda: frechet.frechet_distance(two, of(np.ones((1, 2)))), "2 and 1 samples"),
        (lambda: of(np.array([[1.0, np.nan], [0.0, 1.0]])), "1 of 2 samples are not finite"),
        (lambda: of(np.ones(3)), "shape"),
        (lambda: frechet.moments(lambda x: x, []), "0 batches"),
    ]
    for call, text in cases:
        with pytest.raises(UserError, match=text) as error:
            call()
        assert "\n" not in str(error.value)

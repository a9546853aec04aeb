"""Judges of real digits: accurate, repeatable, and their features lead to their verdicts."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from diffrl.errors import UserError
from diffrl.evaluate import frechet, judges


@pytest.fixture(scope="module")
def digits():
    """(x, x_test, labels, labels_test) of the 1797 handwritten digits, in [-1, 1]."""
    data = load_digits()
    images = (data.images / 8 - 1).astype(np.float32)[..., None]
    return train_test_split(images, data.target, test_size=0.25, random_state=0, stratify=data.target)


@pytest.fixture(scope="module")
def mlp(digits):
    x, x_test, labels, labels_test = digits
    return judges.fit_mlp("MLP-digits", x, labels, x_test, labels_test)


def test_mlp_reads_held_out_digits(digits, mlp):
    _, x_test, _, labels_test = digits
    assert mlp.accuracy >= 0.97
    assert judges.agreement(mlp, x_test, labels_test) == mlp.accuracy
    assert judges.agreement(mlp, x_test, (labels_test + 1) % 10) < 0.02


def test_mlp_is_the_same_for_the_same_seed(digits, mlp):
    x, x_test, labels, labels_test = digits
    again = judges.fit_mlp("again", x, labels, x_test, labels_test)
    np.testing.assert_array_equal(again.features(x_test), mlp.features(x_test))


def test_features_separate_the_classes_linearly(digits, mlp):
    """They are the layer before the verdict: nearest class means in feature space nearly reproduce it."""
    x, x_test, labels, _ = digits
    train = mlp.features(x)
    means = np.stack([train[labels == c].mean(axis=0) for c in range(10)])
    nearest = ((mlp.features(x_test)[:, None] - means) ** 2).sum(axis=-1).argmin(axis=1)
    assert (nearest == mlp.classify(x_test)).mean() > 0.95


def test_distance_of_real_digits_is_far_below_that_of_others(digits, mlp):
    _, x_test, _, labels_test = digits
    real = mlp.features(x_test)
    noisy = mlp.features(np.clip(x_test + np.random.default_rng(0).normal(size=x_test.shape), -1, 1))
    score = frechet.against_real(noisy, real)
    assert score.distance > 2 * score.real
    one_class = frechet.against_real(real[labels_test == 3], real)
    assert one_class.distance > 2 * one_class.real


@pytest.mark.parametrize("count", [1, 4, 6])
def test_network_judge_pads_the_last_batch(count):
    """A linear network whose answers are known, asked for less than, exactly and more than one batch."""

    def apply(params, x):
        features = x.reshape(len(x), -1)[:, :3]
        return features @ params, features

    images = np.random.default_rng(1).uniform(-1, 1, (count, 2, 2, 1)).astype(np.float32)
    expected = images.reshape(count, -1)[:, :3]
    judge = judges.from_network("linear", apply, jnp.eye(3), images, expected.argmax(axis=1), batch=4)
    np.testing.assert_array_equal(judge.features(images), expected)
    assert judge.accuracy == 1.0


def test_a_judge_without_held_out_images_is_refused(digits):
    x, _, labels, _ = digits
    with pytest.raises(UserError, match="0 held-out images"):
        judges.fit_mlp("blind", x[:50], labels[:50], x[:0], labels[:0])

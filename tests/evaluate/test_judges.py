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
    x, x_test, _, labels_test = digits
    noisy = np.clip(x_test + np.random.default_rng(0).normal(size=x_test.shape), -1, 1)
    reference, real, noise, one_class = (
        frechet.moments(mlp.features, [images]) for images in (x, x_test, noisy, x_test[labels_test == 3])
    )
    floor = frechet.frechet_distance(real, reference)
    assert frechet.frechet_distance(noise, reference) > 2 * floor
    assert frechet.frechet_distance(one_class, reference) > 2 * floor


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

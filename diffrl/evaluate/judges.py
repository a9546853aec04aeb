"""Judges: frozen classifiers of real data, for samples.  Do they read as their class; where do their features lie?

A judge's name belongs to the name of every number it gives ("FD-MLP-digits"), because distances on different
features do not compare.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits

from diffrl.errors import UserError


class Judge(NamedTuple):
    """Both functions take images [B, H, W, C] in [-1, 1], for any B."""

    name: str
    features: Callable[[Any], np.ndarray]  # -> [B, D] float
    classify: Callable[[Any], np.ndarray]  # -> [B] int labels
    accuracy: float  # on held-out real images, in [0, 1]


def agreement(judge: Judge, images: Any, labels: Any) -> float:
    """The share of images, in [0, 1], that the judge recognises as their labels."""
    return float(np.mean(judge.classify(images) == np.asarray(labels)))


def fit_mlp(name: str, x: Any, labels: Any, x_test: Any, labels_test: Any, seed: int = 0) -> Judge:
    """A perceptron on pixels, for images as small as 8x8 digits: under a second, and the same for the same seed.

    Args:
        name: of the judge.
        x, x_test: images [N, H, W, C] in [-1, 1]; the test images only measure its accuracy.
        labels, labels_test: integers [N].

    Features are the last hidden layer's 64 activations.
    """
    mlp = MLPClassifier((256, 64), alpha=1e-3, max_iter=60, random_state=seed)
    # One BLAS thread: the same result whatever the number of cores, and sooner for matrices this small.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the iterations are a budget, not a goal
        mlp.fit(_flat(x), np.asarray(labels))

    def features(images: Any) -> np.ndarray:
        hidden = _flat(images)
        for weights, bias in zip(mlp.coefs_[:-1], mlp.intercepts_[:-1], strict=True):
            hidden = np.maximum(hidden @ weights + bias, 0.0)
        return hidden

    def classify(images: Any) -> np.ndarray:
        return mlp.predict(_flat(images))

    return _examined(Judge(name, features, classify, float("nan")), x_test, labels_test)


def from_network(name: str, apply: Callable, params: Any, x_test: Any, labels_test: Any, batch: int = 256) -> Judge:
    """A judge of a network, `apply(params, x) -> (logits [B, K], features [B, D])`.

    It is compiled once, for batches of `batch`: the last one is padded.
    """
    forward = jax.jit(apply)

    def run(images: Any) -> tuple[np.ndarray, np.ndarray]:
        outputs = []
        for start in range(0, len(images), batch):
            part = np.asarray(images[start : start + batch], np.float32)
            padded = np.pad(part, [(0, batch - len(part))] + [(0, 0)] * (part.ndim - 1))
            outputs.append([np.asarray(out)[: len(part)] for out in forward(params, jnp.asarray(padded))])
        logits, features = (np.concatenate(parts) for parts in zip(*outputs, strict=True))
        return logits, features

    judge = Judge(name, lambda x: run(x)[1], lambda x: run(x)[0].argmax(axis=1), float("nan"))
    return _examined(judge, x_test, labels_test)


def _examined(judge: Judge, x_test: Any, labels_test: Any) -> Judge:
    if len(x_test) == 0:
        raise UserError(f"judge {judge.name}: 0 held-out images; hold some out, or its verdicts mean nothing")
    return judge._replace(accuracy=agreement(judge, x_test, labels_test))


def _flat(images: Any) -> np.ndarray:
    images = np.asarray(images, np.float32)
    return images.reshape(len(images), -1)

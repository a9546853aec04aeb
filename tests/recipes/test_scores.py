"""Scores of many images in batches of one size are those of all images at once, with one compiled program."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.data.source import from_arrays
from diffrl.diffusion.losses import denoising as denoising_loss
from diffrl.diffusion.process import add_noise
from diffrl.diffusion.times import uniform
from diffrl.recipes import denoising, judging, noisy_classifier, scores
from diffrl.recipes.denoising import DiffusionConfig
from diffrl.recipes.images import Model

COUNT = 7
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 2, 2, 1), dtype=np.uint8)
LABELS = np.arange(COUNT) % 3


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_batches_have_one_size_and_lose_nothing(batch):
    sizes = set()

    def measure(rows):
        sizes.add(len(rows))
        return rows[:, None] ** 2

    np.testing.assert_array_equal(judging.in_batches(measure, COUNT, batch), np.arange(COUNT)[:, None] ** 2)
    assert sizes == {min(batch, COUNT)}


@pytest.fixture
def session(monkeypatch):
    """As much of one as the scores read; three images a batch."""
    batches = judging.in_batches
    monkeypatch.setattr(judging, "in_batches", lambda measure, num: batches(measure, num, batch=3))
    diffusion = denoising.make_diffusion(DiffusionConfig())
    compiled = []

    def apply(params, x, t, label, keys):
        compiled.append(x.shape)
        shift = 0.0 if label is None else label[:, None, None, None] / 10
        return params * x + shift

    return types.SimpleNamespace(model=Model(apply, None, diffusion, (2, 2, 1), 3), codec=None), compiled


def test_held_out_loss(session):
    opened, compiled = session
    found = scores.held_out_loss(opened, jnp.float32(0.5), from_arrays(PIXELS, LABELS, num_classes=3), draws=2)
    assert compiled == [(3, 2, 2, 1)]
    diffusion = opened.model.diffusion
    objective = denoising_loss(diffusion.process, diffusion.head, uniform())
    x = PIXELS / np.float32(127.5) - 1

    def network(x, t, label):
        return 0.5 * x + label[:, None, None, None] / 10

    each = [
        objective(network, x[i : i + 1], LABELS[i : i + 1], jax.random.fold_in(jax.random.key(seed), i)[None])[0]
        for seed in range(2)
        for i in range(COUNT)
    ]
    assert found == pytest.approx(float(np.mean(each)), rel=1e-5)


def test_accuracies_of_a_noisy_classifier(session, monkeypatch):
    opened, compiled = session
    x = (PIXELS / np.float32(127.5) - 1).astype(np.float32)
    process = opened.model.diffusion.process

    def logits(session, params, x, t):
        compiled.append(x.shape)
        return jnp.stack([x[:, 0, 0, 0], x[:, 0, 1, 0], x[:, 1, 0, 0]], axis=1)

    monkeypatch.setattr(noisy_classifier, "logits", logits)
    found = noisy_classifier.accuracies(opened, None, x, LABELS, (0.1, 0.5))
    assert set(compiled) == {(3, 2, 2, 1)}
    eps = jax.random.normal(jax.random.key(0), x.shape)
    for t, accuracy in zip((0.1, 0.5), found, strict=True):
        noised = np.asarray(add_noise(process, x, jnp.full(COUNT, t), eps))
        assert accuracy == (noised[:, [0, 0, 1], [0, 1, 0], 0].argmax(1) == LABELS).mean()

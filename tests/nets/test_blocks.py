"""The U-Net's parts: resampling by hand, dropout's statistics and its independence of the batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.nets.blocks import AttentionBlock, Dropout, ResidualBlock, double, halve

KEYS = jax.random.split(jax.random.key(1), 6)


def test_double_and_halve_by_hand():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    big = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    np.testing.assert_array_equal(double(x)[0, ..., 0], big)
    y = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(halve(y)[0, ..., 0], [[2.5, 4.5], [10.5, 12.5]])


@pytest.mark.parametrize("rank", [1, 3])
def test_halve_undoes_double(rank):
    x = jax.random.normal(jax.random.key(0), (2, *(4, 6, 2)[:rank], 3))
    np.testing.assert_allclose(halve(double(x)), x, atol=1e-6)


def test_dropout_keeps_the_mean():
    out = Dropout(0.25).apply({}, jnp.ones((6, 64, 64)), KEYS)
    assert sorted(np.unique(out)) == pytest.approx([0.0, 4 / 3])
    # Of 24576 draws the mean has a standard error of 0.0037.
    assert float(out.mean()) == pytest.approx(1.0, abs=0.015)


def test_dropout_of_a_sample_does_not_depend_on_the_batch():
    x = jnp.ones((6, 32))
    whole = Dropout(0.5).apply({}, x, KEYS)
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x[4:], KEYS[4:]), whole[4:])
    assert not np.array_equal(whole[0], whole[1])


def test_dropout_differs_from_layer_to_layer():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, keys):
            return Dropout(0.5, name="a")(x, keys), Dropout(0.5, name="b")(x, keys)

    a, b = Two().apply({}, jnp.ones((6, 64)), KEYS)
    # Independent masks agree on half of the 384 entries, give or take 0.026.
    assert float((a == b).mean()) == pytest.approx(0.5, abs=0.12)


def test_no_keys_or_no_rate_no_dropout():
    x = jnp.ones((6, 8))
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x, None), x)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, KEYS), x)


def test_blocks_start_as_the_identity():
    x = jax.random.normal(jax.random.key(0), (2, 4, 8))
    emb = jnp.ones((2, 16))
    residual = ResidualBlock(8, groups=4, eps=1e-6, dropout=0.0, scale_shift=True, dtype=jnp.float32)
    attending = AttentionBlock(heads=2, groups=4, eps=1e-6, dtype=jnp.float32)

    @jax.jit
    def at_init(key):
        return residual.init_with_output(key, x, emb, None)[0], attending.init_with_output(key, x)[0]

    for out in at_init(jax.random.key(2)):
        np.testing.assert_array_equal(out, x)

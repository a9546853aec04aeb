"""The U-Net's parts: resampling by hand, dropout's statistics and its independence of the batch."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.nets.blocks import AttentionBlock, Dropout, GroupNorm, ResidualBlock, double, halve

KEYS = jax.random.split(jax.random.key(1), 6)


@pytest.mark.parametrize("shape", [(3, 12), (2, 7, 12), (2, 4, 5, 12), (2, 3, 4, 2, 12)])
def test_group_norm_is_that_of_flax(shape):
    keys = jax.random.split(jax.random.key(0), 3)
    x = 3.0 + 2.0 * jax.random.normal(keys[0], shape, jnp.float32)
    params = {"scale": jax.random.normal(keys[1], (12,)), "bias": jax.random.normal(keys[2], (12,))}

    def both(norm):
        def loss(params, x):
            y = norm.apply({"params": params}, x)
            return jnp.sum(jnp.sin(y)), y

        assert jax.tree.structure(norm.init(keys[0], x)["params"]) == jax.tree.structure(params)
        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    want, got = both(nn.GroupNorm(4, epsilon=1e-5)), both(GroupNorm(4, 1e-5))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, want)
    assert GroupNorm(4, 1e-5).apply({"params": params}, x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_groups_that_do_not_divide_are_one_line():
    with pytest.raises(UserError, match="groups=5 does not divide 12 channels"):
        GroupNorm(5, 1e-5).init(jax.random.key(0), jnp.zeros((2, 3, 12)))


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

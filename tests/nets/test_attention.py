"""Attention against float64 by hand; the choice of kernel; cuDNN against XLA where there is a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.nets.attention import attention, cuda_capability, cudnn_fits

HOPPER = (9, 0)


def random_qkv(queries, keys, heads=2, head_dim=8):
    """Logits of standard deviation 3, so that the softmax is far from uniform."""
    rng = np.random.default_rng(0)
    shapes = [(2, n, heads, head_dim) for n in (queries, keys, keys)]
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return 3 * q, k, v


def by_hand(q, k, v):
    """One query at a time, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.empty_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        logits = k[b, :, n] @ q[b, t, n] / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max())
        out[b, t, n] = weights @ v[b, :, n] / weights.sum()
    return out


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7)])
@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)])
def test_xla_equals_float64(queries, keys, dtype, atol):
    # The reference sees the rounded inputs: what differs is the arithmetic alone.
    q, k, v = (jnp.asarray(a, dtype) for a in random_qkv(queries, keys))
    out = attention(q, k, v)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), by_hand(q, k, v), atol=atol)


def test_softmax_is_float32_in_bfloat16():
    """The sum of 4096 equal weights is 1 only if more than bfloat16's 8 bits count them."""
    shape = (1, 4096, 1, 8)
    out = attention(
        jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.zeros(shape, jnp.bfloat16), jnp.ones(shape, jnp.bfloat16)
    )
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, atol=0.01)


def test_cudnn_where_it_is_legal():
    assert cudnn_fits(HOPPER, jnp.bfloat16, 64, 256, 256)
    assert cudnn_fits((8, 0), jnp.float16, 128, 1024, 64)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "queries", "keys"),
    [
        (None, jnp.bfloat16, 64, 256, 256),
        ((7, 5), jnp.bfloat16, 64, 256, 256),
        (HOPPER, jnp.float32, 64, 256, 256),
        (HOPPER, jnp.bfloat16, 36, 256, 256),
        (HOPPER, jnp.bfloat16, 256, 256, 256),
        (HOPPER, jnp.bfloat16, 64, 16, 256),
        (HOPPER, jnp.bfloat16, 64, 256, 16),
    ],
    ids=["no GPU", "too old", "float32", "odd head", "large head", "few queries", "few keys"],
)
def test_xla_where_cudnn_is_not(capability, dtype, head_dim, queries, keys):
    assert not cudnn_fits(capability, dtype, head_dim, queries, keys)


def test_cudnn_equals_xla():
    if cuda_capability() is None:
        pytest.skip("no CUDA device")
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in random_qkv(256, 256, head_dim=64))

    def value_and_grads(implementation):
        def loss(q, k, v):
            out = attention(q, k, v, implementation=implementation)
            return jnp.square(out.astype(jnp.float32)).mean(), out

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=0.03),
        value_and_grads("cudnn"),
        value_and_grads("xla"),
    )

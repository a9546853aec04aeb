"""The noisy classifier: every rank of input, its start at "no idea", what it depends on, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.nets.classifier import NoisyClassifier

TINY = {"num_classes": 5, "channels": 8, "multipliers": (1, 2), "blocks": 1, "heads": 2, "groups": 4}


def variables(net, spatial):
    """Small normals everywhere: the initialiser's zeros would hide the network."""
    x = jax.ShapeDtypeStruct((1, *spatial, 2), jnp.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, jax.ShapeDtypeStruct((1,), jnp.float32))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return tree.unflatten([jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32) for leaf in leaves])


@pytest.mark.parametrize("spatial", [(8,), (8, 4), (4, 4, 2)], ids=["1-D", "2-D", "3-D"])
def test_every_rank_of_input(spatial):
    net = NoisyClassifier(**TINY)
    x, t = jax.ShapeDtypeStruct((3, *spatial, 2), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.float32)
    logits = jax.eval_shape(net.apply, variables(net, spatial), x, t)
    assert logits.shape == (3, 5)
    assert logits.dtype == jnp.float32


def test_each_sample_by_itself_and_by_its_time():
    net = NoisyClassifier(**TINY)
    apply, params = jax.jit(net.apply), variables(net, (8,))
    x, t = jax.random.normal(jax.random.key(1), (3, 8, 2)), jnp.array([3.0, 300.0, 900.0])
    logits = apply(params, x, t)
    np.testing.assert_allclose(apply(params, x[::-1], t[::-1]), logits[::-1], atol=1e-5)
    moved = np.abs(apply(params, x, t[::-1]) - logits).max(axis=1)
    assert (moved > 1e-3).tolist() == [True, False, True]


def test_it_starts_undecided():
    """The head starts at zero, whatever comes before it."""
    net, key = NoisyClassifier(**TINY), jax.random.key(0, impl="rbg")
    logits, _ = jax.jit(net.init_with_output)(key, jnp.ones((2, 8, 2)), jnp.ones(2))
    np.testing.assert_array_equal(logits, 0.0)


def test_bfloat16_is_close_to_float32():
    net = NoisyClassifier(**TINY)
    params, x, t = variables(net, (8,)), jax.random.normal(jax.random.key(1), (3, 8, 2)), jnp.ones(3)
    exact = jax.jit(net.apply)(params, x, t)
    half = jax.jit(NoisyClassifier(**TINY, dtype=jnp.bfloat16).apply)(params, x, t)
    assert half.dtype == jnp.float32
    assert 0 < float(jnp.abs(half - exact).max()) < 0.05 * float(jnp.abs(exact).max())


def test_sizes_that_cannot_be_halved_name_the_remedy():
    with pytest.raises(UserError, match="6x6 cannot halve 2 times"):
        variables(NoisyClassifier(**(TINY | {"multipliers": (1, 1, 1)})), (6, 6))

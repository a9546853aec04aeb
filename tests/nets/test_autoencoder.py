"""The autoencoder's shapes and options; that it is the published network, tests/pretrained shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.nets.autoencoder import SIZES, Autoencoder
from diffrl.nets.patchgan import PatchGAN

SMALL = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "latent": 3, "groups": 4}


def filled(net, x):
    """Parameters of all sizes, from shapes alone: initialisers would compile longer than the network."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(0)
    return {"params": jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), shapes)}


@pytest.mark.parametrize(("options", "code"), [({}, 6), ({"moments": False}, 3), ({"moments": False, "code": 5}, 5)])
def test_shapes(options, code):
    net, x = Autoencoder(image_channels=1, **SMALL, **options), jnp.ones((2, 8, 12, 1))
    variables = filled(net, x)
    h = net.apply(variables, x, method="encode")
    assert h.shape == (2, 4, 6, code)
    z = h[..., :3] if options == {} else h
    assert net.apply(variables, z, method="decode").shape == x.shape
    np.testing.assert_allclose(net.apply(variables, x), net.apply(variables, z, method="decode"), atol=1e-5)


@pytest.mark.parametrize("factor", list(SIZES))
def test_the_factor_is_that_of_its_size(factor):
    multipliers, latent, attention = SIZES[factor]
    net = Autoencoder(latent=latent, multipliers=multipliers, attention=attention)
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    h = jax.eval_shape(lambda v, x: net.apply(v, x, method="encode"), variables, x)
    assert h.shape == (1, 64 // factor, 64 // factor, 2 * latent)
    attends = [name for name in variables["params"]["encoder"] if "attention" in name and name != "mid_attention"]
    assert len(attends) == 2 * len(attention)


def test_the_last_layer_is_all_that_is_left_after_the_features():
    net, x = Autoencoder(image_channels=1, **SMALL), jnp.ones((2, 8, 8, 1))
    variables, z = filled(net, x), jnp.ones((2, 4, 4, 3))
    h = net.apply(variables, z, method="features")
    assert h.shape == (2, 8, 8, 8)
    np.testing.assert_allclose(
        net.apply(variables, h, method="last"), net.apply(variables, z, method="decode"), atol=1e-6
    )
    doubled = {
        "params": variables["params"] | {"conv_out": jax.tree.map(lambda w: 2 * w, variables["params"]["conv_out"])}
    }
    np.testing.assert_allclose(
        net.apply(doubled, z, method="decode"), 2 * net.apply(variables, z, method="decode"), rtol=1e-5
    )


@pytest.mark.long
def test_remat_changes_nothing():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 1)), jnp.float32)
    nets = [Autoencoder(image_channels=1, remat=remat, **SMALL) for remat in (False, True)]
    variables = filled(nets[0], x)
    values = [jax.value_and_grad(lambda v, net=net: (net.apply(v, x) ** 2).mean())(variables) for net in nets]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *values)


def test_wrong_sizes_are_named():
    with pytest.raises(UserError, match="9x8 cannot be halved 1 times"):
        Autoencoder(**SMALL).init(jax.random.key(0), jnp.zeros((1, 9, 8, 3)))
    with pytest.raises(UserError, match=r"groups=3 does not divide .* groups=2 does"):
        Autoencoder(**{**SMALL, "groups": 3}).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


@pytest.mark.long
def test_a_verdict_sees_seventy_pixels():
    """The receptive field of the paper's critic, read off its gradient; what the norms let through is far smaller."""
    critic = PatchGAN(channels=4, groups=1)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 128, 128, 1)), jnp.float32)
    variables = filled(critic, x)
    logits = critic.apply(variables, x)
    assert logits.shape == (1, 14, 14, 1)
    slope = jax.grad(lambda x: critic.apply(variables, x)[0, 7, 7, 0])(x)[0, :, :, 0]
    rows = np.flatnonzero(np.abs(slope).max(1) > 0.05 * np.abs(slope).max())
    assert 50 < rows[-1] - rows[0] + 1 <= 70


def test_images_too_small_for_the_critic_are_named():
    with pytest.raises(UserError, match="at least 24 pixels, not 8; take fewer"):
        PatchGAN(channels=4, groups=2).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))

"""The U-Net: published parameter counts, every rank of input, precision, rematerialisation, dropout, errors.

That its output is right is shown in tests/pretrained/test_diffusers_unet.py, against another implementation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.nets.unet import UNet

SMALL = {
    "out_channels": 3,
    "channels": 16,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention": (4,),
    "groups": 8,
}
ADM = {"scale_shift": True, "resample_blocks": True, "cos_first": True, "freq_shift": 0.0, "norm_eps": 1e-5}


def shapes(net, spatial, channels=3):
    x = jax.ShapeDtypeStruct((1, *spatial, channels), jnp.float32)
    return jax.eval_shape(net.init, jax.random.key(0), x, jax.ShapeDtypeStruct((1,), jnp.float32))


def random_variables(net, spatial, channels=3):
    """Small normals everywhere, last layers included: the initialiser's zeros would hide the network."""
    leaves, tree = jax.tree.flatten(shapes(net, spatial, channels))
    rng = np.random.default_rng(0)
    return tree.unflatten([jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32) for leaf in leaves])


def batch(spatial, size=2, channels=3):
    x = jax.random.normal(jax.random.key(1), (size, *spatial, channels))
    return x, jnp.linspace(3.0, 700.0, size)


def parameter_count(net, size):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(net, (size, size))))


def test_ddpm_cifar10_has_the_published_number_of_parameters():
    assert parameter_count(UNet(out_channels=3, dropout=0.1), 32) == 35_746_307


@pytest.mark.parametrize(
    ("millions", "size", "fields"),
    [
        (296, 64, {"channels": 192, "multipliers": (1, 2, 3, 4), "blocks": 3, "head_dim": 64}),
        (422, 128, {"channels": 256, "multipliers": (1, 1, 2, 3, 4), "heads": 4}),
        (554, 256, {"channels": 256, "multipliers": (1, 1, 2, 2, 4, 4), "head_dim": 64}),
    ],
)
def test_adm_imagenet_has_the_published_number_of_parameters(millions, size, fields):
    """Dhariwal and Nichol's table of hyperparameters, in millions; with classes and a learned variance."""
    net = UNet(out_channels=6, attention=(32, 16, 8), num_classes=1000, **ADM, **fields)
    assert round(parameter_count(net, size) / 1e6) == millions


@pytest.mark.parametrize("spatial", [(8,), (8, 4), (8, 4, 2)], ids=["1-D", "2-D", "3-D"])
@pytest.mark.parametrize("fields", [{}, ADM], ids=["ddpm", "adm"])
def test_every_rank_of_input(spatial, fields):
    net = UNet(**(SMALL | fields | {"out_channels": 5}))
    x, t = batch(spatial, channels=2)
    out = jax.jit(net.apply)(random_variables(net, spatial, 2), x, t)
    assert out.shape == (2, *spatial, 5)
    assert out.dtype == jnp.float32
    assert np.isfinite(out).all()
    assert float(out.std()) > 0.01


# One signal network for what follows: cheap to compile, with every source of variation in it.
TINY = SMALL | {
    "channels": 8,
    "multipliers": (1, 1),
    "groups": 4,
    "num_classes": 3,
    "scale_shift": True,
    "dropout": 0.5,
}
KEYS = jax.random.split(jax.random.key(2), 4)
LABELS = jnp.array([0, 1, 2, 3])


@pytest.fixture(scope="module")
def tiny():
    """(variables, jitted apply, x, t)."""
    net = UNet(**TINY)
    return random_variables(net, (4,)), jax.jit(net.apply), *batch((4,), size=4)


@pytest.mark.long
def test_jit_equals_no_jit(tiny):
    variables, apply, x, t = tiny
    plain = UNet(**TINY).apply(variables, x, t, LABELS, KEYS)
    np.testing.assert_allclose(apply(variables, x, t, LABELS, KEYS), plain, atol=1e-5)


def test_dropout_of_a_sample_does_not_depend_on_the_batch(tiny):
    variables, apply, x, t = tiny
    whole = apply(variables, x, t, LABELS, KEYS)
    part = apply(variables, x[2:], t[2:], LABELS[2:], KEYS[2:])
    np.testing.assert_allclose(part, whole[2:], atol=1e-5)
    others = apply(variables, x, t, LABELS, KEYS[::-1])
    assert float(jnp.abs(whole - others).max()) > 0.01


def test_no_labels_means_the_null_class(tiny):
    variables, apply, x, t = tiny
    np.testing.assert_array_equal(apply(variables, x, t), apply(variables, x, t, jnp.full(4, 3)))
    moved = jnp.abs(apply(variables, x, t, LABELS) - apply(variables, x, t)).max(axis=(1, 2))
    assert (moved > 0.01).tolist() == [True, True, True, False]


def test_bfloat16_is_close_to_float32(tiny):
    variables, apply, x, t = tiny
    exact = apply(variables, x, t, LABELS)
    half = jax.jit(UNet(**TINY, dtype=jnp.bfloat16).apply)(variables, x, t, LABELS)
    assert half.dtype == jnp.float32
    assert 0 < float(jnp.abs(half - exact).max()) < 0.05 * float(jnp.abs(exact).max())


@pytest.mark.long
def test_remat_gives_the_same_parameters_and_gradients():
    plain, remat = UNet(**TINY), UNet(**TINY, remat=True)
    variables, (x, t) = random_variables(plain, (4,)), batch((4,), size=4)
    assert jax.tree.structure(shapes(remat, (4,))) == jax.tree.structure(variables)

    def gradients(net):
        return jax.jit(jax.grad(lambda v: jnp.square(net.apply(v, x, t, LABELS, KEYS)).mean()))

    # The dropout masks are drawn anew in the backward pass; they must be those of the forward pass.
    different = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), *(gradients(n)(variables) for n in (plain, remat))
    )
    assert max(jax.tree.leaves(different)) < 1e-5
    assert ["remat" in str(gradients(net).trace(variables).jaxpr) for net in (plain, remat)] == [False, True]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"multipliers": (1, 1, 1, 1)}, "size 12x8 cannot be halved 3 times; pad it to multiples of 8"),
        ({"groups": 32}, "groups=16 does"),
        ({"heads": 3}, "heads=3 does not divide"),
        ({"head_dim": 64}, "head_dim=64 does not divide"),
    ],
)
def test_impossible_shapes_name_the_remedy(fields, message):
    with pytest.raises(UserError, match=message):
        shapes(UNet(**(SMALL | fields)), (12, 8))


def test_labels_for_a_network_without_classes():
    net = UNet(**SMALL)
    with pytest.raises(UserError, match="num_classes=None"):
        jax.eval_shape(net.init, jax.random.key(0), *batch((8,)), jnp.zeros(2, jnp.int32))

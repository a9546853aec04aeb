"""The diffusion transformer: the paper's counts, the identity that it begins as, and that options change no meaning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.nets import dit
from diffrl.nets.dit import CONDITIONINGS, SIZES, DiT

SMALL = DiT(3, width=16, depth=2, heads=2, num_classes=4)
X = jax.random.normal(jax.random.key(0), (2, 4, 8, 3))
T = jnp.array([3.0, 700.0])


def change(net, **fields):
    return dataclasses.replace(net, **fields)


def random_params(net, x=X):
    """Numbers everywhere, where the start has zeros."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, T)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32), shapes)


def run(net, params, *arguments):
    return jax.jit(net.apply)({"params": params}, *arguments)


@pytest.mark.parametrize(
    ("size", "patch", "millions", "giga"),
    # Tables 1 and 4 of the paper: parameters, and multiply-adds on latents 32 x 32 x 4.
    [("S", 2, 33, 6.06), ("B", 4, 130, 5.56), ("L", 8, 459, 5.01), ("L", 2, 458, 80.71), ("XL", 2, 675, 118.64)],
)
def test_counts_are_the_papers(size, patch, millions, giga):
    net = DiT(8, *SIZES[size], patch=patch, num_classes=1000, scan=False)
    x, t = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, t)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count / 1e6 == pytest.approx(millions, abs=1.2)
    products = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                lhs = equation.invars[0].aval.shape
                products.append(np.prod(equation.outvars[0].aval.shape) * np.prod([lhs[i] for i in contracted]))
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)  # of the functions that it calls
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(net.apply)(shapes, x, t).jaxpr)
    assert sum(products) / 1e9 == pytest.approx(giga, rel=0.01)


def test_it_begins_as_nothing_and_its_blocks_as_the_identity():
    """adaLN-zero: the first output is 0, and with another last layer it is that of no blocks at all."""
    start = jax.jit(SMALL.init)(jax.random.key(0), X, T)["params"]
    assert not np.any(run(SMALL, start, X, T))
    last = random_params(SMALL)["out"]
    deep = run(SMALL, {**start, "out": last}, X, T)
    fewer = {name: tree for name, tree in start.items() if name != "blocks"}
    shallow = run(change(SMALL, depth=0, scan=False), {**fewer, "out": last}, X, T)
    assert np.abs(deep).max() > 0.1
    np.testing.assert_allclose(deep, shallow, rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_scan_and_remat_change_nothing(conditioning):
    """Unrolled blocks with their slices of the parameters, and recomputed ones: the same outputs and gradients."""
    net = change(SMALL, conditioning=conditioning)
    params = random_params(net)
    labels = jnp.array([1, 4])

    def value(net):
        def loss(params):
            y = net.apply({"params": params}, X, T, labels)
            return jnp.sum(y**2), y

        return jax.jit(jax.grad(loss, has_aux=True))

    grads, y = value(net)(params)
    again, y_again = value(change(net, remat="dots"))(params)
    blocks = {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(2)}
    rest = {name: tree for name, tree in params.items() if name != "blocks"}
    unrolled, y_unrolled = value(change(net, scan=False))(rest | blocks)
    for other in (y_again, y_unrolled):
        np.testing.assert_allclose(other, y, rtol=1e-4, atol=1e-4)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), unrolled.pop("block_0"), unrolled.pop("block_1"))
    for other in (again, unrolled | {"blocks": stacked}):
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_time_label_and_place_are_seen(conditioning, positions):
    """Another time, label or arrangement of patches gives another output; None is the null class."""
    net = change(SMALL, conditioning=conditioning, positions=positions, qk_norm=True)
    params = random_params(net)
    apply = jax.jit(net.apply)
    base = apply({"params": params}, X, T, jnp.array([1, 1]))
    for other in (
        apply({"params": params}, X, T + 200, jnp.array([1, 1])),
        apply({"params": params}, X, T, jnp.array([2, 2])),
        apply({"params": params}, X[:, ::-1], T, jnp.array([1, 1]))[:, ::-1],
    ):
        assert np.abs(other - base).max() > 3e-4
    null = apply({"params": params}, X, T, jnp.array([4, 4]))
    np.testing.assert_array_equal(jax.jit(net.apply)({"params": params}, X, T), null)


def test_rotations_make_attention_relative():
    """Products of turned queries and keys depend on the offset of two patches alone."""
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 8))
    turns = dit.rotations(3, 5, 8)

    def everywhere(x):
        return dit.turned(jnp.broadcast_to(x, (1, 15, 1, 8)), turns)[0, :, 0].reshape(3, 5, 8)

    a, b = everywhere(q), everywhere(k)
    products = jnp.einsum("rch,sdh->rcsd", a, b)
    np.testing.assert_allclose(products[:2, :4, :2, :4], products[1:, 1:, 1:, 1:], atol=1e-5)
    assert np.abs(products[0, 0, 0, 0] - products[0, 0, 1, 0]) > 1e-3
    assert np.abs(products[0, 0, 1, 0] - products[0, 0, 0, 1]) > 1e-3


def test_patches_and_back():
    h = dit.patches(X, 2)
    assert h.shape == (2, 8, 12)
    np.testing.assert_array_equal(h[0, 1], X[0, :2, 2:4].reshape(-1))
    np.testing.assert_array_equal(dit.unpatched(h, 2, 4, 2), X)


def test_bfloat16_stays_near():
    params = random_params(SMALL)
    want, got = (run(change(SMALL, dtype=dtype), params, X, T) for dtype in (jnp.float32, jnp.bfloat16))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=0.05 * np.abs(want).max())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"patch": 3}, "patch=3 does not divide an input of 4x8"),
        ({"heads": 3}, "heads=3 does not divide width=16"),
        ({"width": 18, "heads": 3}, "multiple of 4 channels, not 18"),
        ({"positions": "rope", "width": 20}, "not 10"),
        ({"conditioning": "adaln_zer"}, "did you mean 'adaln_zero'"),
        ({"remat": "som"}, "choose from none, dots, full"),
    ],
)
def test_mistakes_are_one_line(fields, words):
    with pytest.raises(UserError, match=words):
        jax.eval_shape(change(SMALL, **fields).init, jax.random.key(0), X, T)


def test_labels_need_classes():
    net = change(SMALL, num_classes=None)
    with pytest.raises(UserError, match="num_classes=None was given labels"):
        jax.eval_shape(net.init, jax.random.key(0), X, T, jnp.array([0, 1]))

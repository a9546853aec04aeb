"""Diffuser's networks: parameter counts, what they see, that the two forms of a convolution are one, errors.

That their output is right is shown in tests/pretrained/test_diffusers_temporal_unet.py, against another implementation.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from diffrl.errors import UserError
from diffrl.nets.temporal_unet import Lengthen, TemporalUNet, TemporalValue, convolve, convolved, mish, unfolded

X = jax.random.normal(jax.random.key(0), (3, 8, 5))
T = jnp.array([0.0, 7.0, 99.0])
VALUE = jnp.array([[0.3, -1.0], [0.9, 0.2], [0.1, 0.5]])
SMALL = {"channels": 8, "multipliers": (1, 2), "groups": 4, "conditions": 2}


def shapes(net, x=X, *rest):
    return jax.eval_shape(net.init, jax.random.key(0), x, T[: x.shape[0]], *rest)


def count(net, horizon, channels):
    x = jax.ShapeDtypeStruct((1, horizon, channels), jnp.float32)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(net, x)))


def random_variables(net, x=X):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), jnp.float32), shapes(net, x))


@pytest.fixture(scope="module", params=[TemporalUNet(5, **SMALL), TemporalValue(**SMALL)], ids=["plan", "value"])
def small(request):
    """A jitted function of (x, t, cond) with its parameters in."""
    variables = random_variables(request.param)
    return jax.jit(lambda *told: request.param.apply(variables, *told))


def condition(known):
    return {"value": VALUE, "known": jnp.asarray(known)}


def test_counts_are_the_sums_of_the_papers_layers():
    """By hand, for channels c: a block has 5 (a + b) b + 2 b for convolutions, 4 b for norms, ..."""

    def block(a, b, c):
        return 5 * (a + b) * b + 2 * b + 4 * b + (c + 1) * b + ((a + 1) * b if a != b else 0)

    embedding = 33 * 128 + 129 * 32
    both = [(6, 32), (32, 32), (32, 128), (128, 128), (128, 256), (256, 256)]
    middle = [(256, 256), (256, 256)]
    up = [(512, 128), (128, 128), (256, 32), (32, 32)]
    planner = sum(block(a, b, 32) for a, b in both + middle + up)
    planner += (3 * 32 + 1) * 32 + (3 * 128 + 1) * 128  # strided
    planner += (4 * 128 + 1) * 128 + (4 * 32 + 1) * 32  # transposed
    planner += (5 * 32 + 1) * 32 + 2 * 32 + 33 * 6  # the end
    assert count(TemporalUNet(6), 128, 6) == planner + embedding

    value = sum(block(a, b, 32) for a, b in [*both, (256, 128), (128, 64)])
    value += sum((3 * b + 1) * b for b in (32, 128, 256, 128, 64))
    features = 64 * 2  # of a horizon of 40, that is halved to 20, 10, 5, 3 and 2
    value += (features + 32 + 1) * (features // 2) + features // 2 + 1
    assert count(TemporalValue(multipliers=(1, 4, 8)), 40, 6) == value + embedding


def test_outputs_see_the_time_and_the_condition(small):
    base = small(X, T, condition([1.0, 1.0, 1.0]))
    assert base.dtype == jnp.float32
    assert base.shape[0] == 3
    for other in (small(X, T + 3, condition([1.0, 1.0, 1.0])), small(X, T, condition([0.0, 0.0, 0.0]))):
        assert np.abs(other - base).reshape(3, -1).max(axis=1).min() > 1e-4


def test_unknown_is_the_null_condition(small):
    """Whatever its value, sample by sample, and so is no condition at all."""
    null = small(X, T, None)
    mixed = small(X, T, condition([1.0, 0.0, 1.0]))
    np.testing.assert_array_equal(small(X, T, condition([0.0, 0.0, 0.0])), null)
    np.testing.assert_allclose(mixed[1], null[1], atol=1e-6)
    assert np.abs(mixed - null)[np.array([0, 2])].max() > 1e-3


def test_any_horizon_for_a_value_and_one_network_for_all_plans():
    net = TemporalUNet(5, **SMALL)
    assert jax.tree.leaves(shapes(net)) == jax.tree.leaves(shapes(net, jnp.zeros((3, 24, 5))))
    value, x = TemporalValue(**SMALL), X[:, :7]
    assert jax.eval_shape(value.apply, shapes(value, x), x, T).shape == (3,)


@pytest.mark.parametrize(("taps", "stride", "length"), [(5, 1, 8), (3, 2, 8), (3, 2, 7), (1, 1, 8), (5, 1, 1)])
def test_the_two_forms_of_a_convolution_are_one(taps, stride, length):
    """Values, both gradients and, inside a scan, what `convolve` takes on this platform."""
    keys = jax.random.split(jax.random.key(1), 2)
    x, kernel = jax.random.normal(keys[0], (2, length, 3)), jax.random.normal(keys[1], (taps, 3, 4))

    def all_of_it(form):
        def loss(x, kernel):
            y = form(x, kernel)
            return jnp.sum(jnp.sin(y)), y

        def step(carry, _):
            return carry, jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, kernel)

        return jax.jit(lambda: lax.scan(step, 0, length=1)[1])()

    fields = {"stride": stride, "padding": taps // 2}
    want, product = (all_of_it(functools.partial(form, **fields)) for form in (convolved, unfolded))
    here = all_of_it(lambda x, kernel: convolve(x, kernel, stride, taps // 2))
    for got in (product, here):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, want)


def test_only_a_cpus_gradients_multiply_windows():
    x, kernel = jnp.zeros((2, 8, 3)), jnp.zeros((5, 3, 4))

    def convolutions(function):
        programs = {name: jax.export.export(jax.jit(function), platforms=[name]) for name in ("cpu", "cuda", "tpu")}
        return {name: "stablehlo.convolution" in make(x, kernel).mlir_module() for name, make in programs.items()}

    def energy(x, kernel):
        return jnp.sum(convolve(x, kernel, 1, 2) ** 2)

    assert convolutions(energy) == {"cpu": True, "cuda": True, "tpu": True}
    assert convolutions(jax.grad(energy, argnums=(0, 1))) == {"cpu": False, "cuda": True, "tpu": True}


def test_lengthening_is_the_transposed_convolution_that_it_says():
    kernel = np.random.default_rng(0).standard_normal((4, 5, 5)).astype(np.float32)
    y = np.zeros((3, 2 * 8 + 2, 5), np.float32)  # of places -1 ... 16
    for i in range(8):
        for j in range(4):
            y[:, 2 * i + j] += X[:, i] @ kernel[j]
    got = Lengthen(jnp.float32).apply({"params": {"kernel": kernel, "bias": jnp.ones(5)}}, X)
    np.testing.assert_allclose(got, y[:, 1:-1] + 1, atol=1e-4)


def test_mish_at_every_size():
    """x tanh(log(1 + e^x)) in float64, and its slope, from where e^x vanishes to where it overflows."""
    x = np.array([-200.0, -30.0, -3.0, -1e-3, 0.0, 1e-3, 3.0, 19.9, 20.1, 200.0])
    np.testing.assert_allclose(mish(jnp.float32(x)), x * np.tanh(np.logaddexp(0, x)), rtol=2e-6, atol=1e-30)
    step = 1e-4
    ends = [(x + d) * np.tanh(np.logaddexp(0, x + d)) for d in (-step, step)]
    slopes = jax.vmap(jax.grad(mish))(jnp.float32(x))
    np.testing.assert_allclose(slopes, (ends[1] - ends[0]) / (2 * step), atol=1e-5)


def test_bfloat16_stays_near():
    net = TemporalUNet(5, **SMALL)
    variables = random_variables(net)
    want = jax.jit(net.apply)(variables, X, T)
    half = jax.jit(TemporalUNet(5, **SMALL, dtype=jnp.bfloat16).apply)(variables, X, T)
    assert half.dtype == jnp.float32
    assert 0 < float(jnp.abs(half - want).max()) < 0.05 * float(jnp.abs(want).max())


@pytest.mark.parametrize(
    ("net", "horizon", "cond", "words"),
    [
        (TemporalUNet(5, multipliers=(1, 2, 4, 8)), 100, None, "100 cannot be halved 3 times; take 96 or 104, or"),
        (TemporalUNet(5), 3, None, "3 cannot be halved 2 times; take 4, or"),
        (TemporalUNet(5, channels=12), 8, None, r"groups=8 does not divide the levels' channels .* groups=6 does"),
        (TemporalValue(channels=8, multipliers=(1, 2)), 8, None, r"\[8, 16, 8, 4\]; groups=4 does"),
        (TemporalUNet(5), 8, {"value": VALUE, "known": jnp.ones(3)}, "conditions=0 was given a condition"),
        (TemporalValue(conditions=1), 8, {"value": VALUE, "known": jnp.ones(3)}, r"\[3, 2\] came where \[3, 1\] is"),
        (TemporalUNet(5, kernel=4), 8, None, "kernel=4 has no middle; make it odd"),
    ],
    ids=["horizon", "short", "groups", "halved groups", "no conditions", "other conditions", "even kernel"],
)  # fmt: skip
def test_mistakes_are_one_line(net, horizon, cond, words):
    with pytest.raises(UserError, match=words):
        shapes(net, jnp.zeros((3, horizon, 5)), cond)

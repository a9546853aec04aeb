"""Heads: round trips, Tweedie's formula, and velocities that carry the density (the continuity equation)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_cases import CURVES, NAMES, blobs, key, switched

from diffrl.diffusion import mixtures, prediction
from diffrl.diffusion.process import add_noise

HEADS = {
    "eps": prediction.eps_head,
    "x0": prediction.x0_head,
    "v": prediction.v_head,
    "score": prediction.score_head,
    "velocity": prediction.velocity_head,
    "edm": prediction.edm_head,
}
TIMES = jnp.linspace(0.011, 0.989, 64)  # between the nodes of the table too


@jax.jit
def round_trips(index, x0, eps, t):
    """Of every head: x0 from its target, its target, the output recovered from x_0, and d x_0 / d y."""
    process = switched(index)
    xt = add_noise(process, x0, t, eps)
    results = {}
    for name, make in HEADS.items():
        head = make(process)
        y = head.target(x0, eps, t)
        back = prediction.to_output(process, head, xt, t, x0)
        tangent = jax.jvp(lambda y, head=head: head.x0(xt, y, t), (y,), (jnp.ones_like(y),))[1]
        results[name] = (head.x0(xt, y, t), y, back, tangent[:, 0], prediction.slope(head, t))
    return xt, results


@pytest.mark.parametrize("name", NAMES)
def test_every_head_round_trips(name):
    """x_0 -> y -> x_0 loses what dividing by alpha amplifies; y -> x_0 -> y what dividing by sigma does."""
    x0, eps = jax.random.normal(key(0), (64, 5)), jax.random.normal(key(1), (64, 5))
    _xt, results = round_trips(NAMES.index(name), x0, eps, TIMES)
    alpha, sigma = CURVES[name](np.asarray(TIMES, np.float64))
    to_x0 = 1e-6 * (1 + sigma / alpha)[:, None] * 10
    for head, (again, y, back, tangent, slope) in results.items():
        assert np.all(np.abs(again - x0) < to_x0), head
        scale = np.abs(y).max(axis=1, keepdims=True)
        assert np.all(np.abs(back - y) / scale < 1e-5 * (1 + alpha / sigma)[:, None]), head
        np.testing.assert_allclose(slope, tangent, rtol=1e-5, err_msg=head)


def test_special_values():
    """At t = 1 with alpha = 0, v is -x_0 and the estimate is finite; at t = 0, v is eps."""
    process = switched(0)
    head = prediction.v_head(process)
    x0, eps = jnp.array([[0.5], [0.5]]), jnp.array([[2.0], [2.0]])
    t = jnp.array([0.0, 1.0])
    y = head.target(x0, eps, t)
    np.testing.assert_allclose(y, [[2.0], [-0.5]], atol=1e-6)
    estimate = head.x0(add_noise(process, x0, t, eps), y, t)
    np.testing.assert_allclose(estimate, x0, atol=1e-6)
    straight = prediction.velocity_head(switched(NAMES.index("flow")))
    np.testing.assert_allclose(straight.target(x0, eps, t), eps - x0, atol=1e-6)


def test_edm_preconditioning():
    """EDM, table 1, at sigma = sigma_data = 0.5: c_skip = 1/2, c_out = 1/(2 sqrt 2), c_in = sqrt 2; unit variances."""
    process = switched(NAMES.index("flow"))
    head = prediction.edm_head(process, 0.5)
    t = jnp.full(200_000, 1 / 3)  # sigma / alpha = 1/2
    x0, eps = 0.5 * jax.random.normal(key(0), t.shape), jax.random.normal(key(1), t.shape)
    shown, target = jax.jit(lambda x0, eps: (head.inputs(add_noise(process, x0, t, eps), t), head.target(x0, eps, t)))(
        x0, eps
    )
    np.testing.assert_allclose(shown, np.sqrt(2) * (x0 + 0.5 * eps), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(target, np.sqrt(8) * (x0 - 0.5 * (x0 + 0.5 * eps)), rtol=1e-4, atol=1e-5)
    assert [float(shown.std()), float(target.std())] == pytest.approx([1.0, 1.0], rel=0.01)
    assert float(jnp.corrcoef(shown, target)[0, 1]) == pytest.approx(0.0, abs=0.01)


MOMENTS = np.array([0.1105, 0.3005, 0.5205, 0.7705])  # between the table's nodes


def typical(name):
    """A point [4, 2] of about the noised blobs' size at each of MOMENTS."""
    alpha, sigma = CURVES[name](MOMENTS)
    points = np.array([[0.5, -0.3], [-0.2, 0.8], [0.9, 0.1], [-1.0, 0.4]])
    return points * np.sqrt(0.4 * alpha**2 + sigma**2)[:, None]


@jax.jit
def exact_outputs(index, x, t):
    """Score and velocity of the blobs from the exact denoiser, through the heads, and log p_t's derivatives."""
    process, m = switched(index), blobs()
    denoise = mixtures.denoiser(m, process)

    def output(make, x):
        return prediction.to_output(process, make(process), x[None], t[None], denoise(x[None], t[None]))[0]

    def log_p(x, t):
        return mixtures.log_density(m, process, x[None], t)[0]

    velocity = output(prediction.velocity_head, x)
    divergence = jnp.trace(jax.jacfwd(lambda x: output(prediction.velocity_head, x))(x))
    rate = jax.jvp(lambda t: log_p(x, t), (t,), (jnp.ones_like(t),))[1]
    return output(prediction.score_head, x), jax.grad(log_p)(x, t), velocity, divergence, rate


@pytest.mark.parametrize("name", NAMES)
def test_tweedie_and_the_continuity_equation(name):
    """The score head's output is grad log p_t, and the velocity v obeys d log p/dt = -div v - v . grad log p."""
    for t, point in zip(MOMENTS, typical(name), strict=True):
        score, gradient, velocity, divergence, rate = exact_outputs(
            NAMES.index(name), jnp.asarray(point, jnp.float32), jnp.float32(t)
        )
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(score / scale, gradient / scale, atol=3e-4)
        terms = np.array([divergence, velocity @ gradient])
        assert abs(rate + terms.sum()) < 1e-3 * (np.abs(terms).sum() + abs(rate))


@pytest.mark.parametrize("name", NAMES)
def test_velocity_is_the_probability_flow(name):
    """v = f x - g^2 / 2 score, with f = (log alpha)' and g^2 = (sigma^2)' - 2 f sigma^2 by float64 differences."""
    t, h, x = MOMENTS, 1e-5, typical(name)
    (_alpha, sigma), low, high = CURVES[name](t), CURVES[name](t - h), CURVES[name](t + h)
    f = (np.log(high[0]) - np.log(low[0])) / (2 * h)
    g2 = (high[1] ** 2 - low[1] ** 2) / (2 * h) - 2 * f * sigma**2
    for i in range(4):
        _, score, velocity, _, _ = exact_outputs(NAMES.index(name), jnp.asarray(x[i], jnp.float32), jnp.float32(t[i]))
        expected = f[i] * x[i] - 0.5 * g2[i] * np.asarray(score, np.float64)
        np.testing.assert_allclose(velocity, expected, atol=5e-4 * np.abs(expected).max())


def test_adapters_give_the_exact_denoiser():
    """Every from_* and edm undo what to_output and `inputs` did, with the condition passed through."""
    process, m = switched(0), blobs()
    exact = mixtures.denoiser(m, process)
    x, t, cond = jax.random.normal(key(0), (6, 2)), jnp.linspace(0.1, 0.9, 6), jnp.arange(6)
    makes = {
        "eps": prediction.from_eps,
        "x0": prediction.from_x0,
        "v": prediction.from_v,
        "score": prediction.from_score,
        "velocity": prediction.from_velocity,
        "edm": prediction.edm,
    }

    @jax.jit
    def adapted(x, t, cond):
        outputs = {}
        for name, make in makes.items():
            head = HEADS[name](process)

            def model(shown, t, cond, head=head):
                x = shown / head.inputs(jnp.ones_like(shown), t)
                return prediction.to_output(process, head, x, t, exact(x, t) + 0.1 * cond[:, None])

            outputs[name] = make(process, model)(x, t, cond)
        return outputs

    expected = exact(x, t) + 0.1 * cond[:, None]
    for name, x0 in adapted(x, t, cond).items():
        np.testing.assert_allclose(x0, expected, atol=2e-5, err_msg=name)


def test_variance_channels():
    """The second half of the channels is 2 v - 1; the first is the head's output, and the network is called once."""
    calls = []

    def model(x, t, cond):
        calls.append(x.shape)
        return jnp.concatenate([0.5 * x, jnp.full_like(x[..., :1], -1.0), jnp.full_like(x[..., :1], 3.0)], -1)

    process = switched(0)
    x, t = jnp.ones((2, 3, 2)), jnp.array([0.3, 0.6])
    x0, v = prediction.from_eps_and_var(process, model)(x, t, None)
    assert calls == [(2, 3, 2)]
    np.testing.assert_array_equal(v, np.broadcast_to([0.0, 2.0], v.shape))
    expected = prediction.from_eps(process, lambda x, t, cond: 0.5 * x)(x, t, None)
    np.testing.assert_array_equal(x0, expected)

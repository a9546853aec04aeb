"""Dequantisation: densities by autodiff and scipy, and bounds on a rounded Gaussian whose exact mass is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from diffusion_cases import key

from diffrl.diffusion import process as P
from diffrl.diffusion.dequantisation import bits_per_dim, probit_affine, truncated_normal, uniform, variational
from diffrl.diffusion.likelihood import HALF_BIN

SKEWED = variational(probit_affine(lambda x0: (0.5 + 0.3 * x0, -0.4 + 0.2 * x0)))
DEQUANTISERS = {
    "uniform": uniform,
    "probit_affine": SKEWED,
    "narrow": truncated_normal(P.cosine(), 5e-4),
    "wide": truncated_normal(P.cosine(), 2e-2),
}
EPS = jnp.asarray(scipy.stats.norm.ppf((np.arange(400) + 0.5) / 400), jnp.float32)


@pytest.mark.parametrize("name", DEQUANTISERS)
def test_density_is_that_of_the_draws(name):
    """q(z) = N(eps) / |dz / deps|; the draws fill the bin and stay in it; dimensions add up."""
    dequantise = DEQUANTISERS[name]

    def one(eps):
        return dequantise(jnp.zeros((1, 1)), eps[None, None])[0][0, 0]

    z, log_q = dequantise(jnp.zeros((400, 1)), EPS[:, None])
    assert float(jnp.abs(z).max()) <= HALF_BIN * (1 + 1e-4)
    assert float(jnp.abs(z).max()) > 0.5 * HALF_BIN
    middle = slice(20, -20)  # in the tails the slope itself vanishes
    slope = jax.jit(jax.vmap(jax.grad(one)))(EPS[middle])
    expected = scipy.stats.norm.logpdf(EPS[middle]) - np.log(np.asarray(slope, float))
    np.testing.assert_allclose(log_q[middle], expected, atol=2e-3)
    both = dequantise(jnp.zeros((2, 3)), jnp.broadcast_to(EPS[100], (2, 3)))[1]
    np.testing.assert_allclose(both, 3 * log_q[100], rtol=1e-5)


def test_uniform_noise_is_uniform():
    eps = jax.random.normal(key(0), (4000, 1))
    z, log_q = uniform(jnp.full((4000, 1), -1.0), eps)
    u = (np.asarray(z, float) + 1) / (2 * HALF_BIN) + 0.5
    assert scipy.stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    np.testing.assert_allclose(log_q, np.log(127.5), rtol=1e-6)
    start = variational(probit_affine(lambda x0: (0.0, jnp.zeros_like(x0))))(jnp.full((4000, 1), -1.0), eps)
    np.testing.assert_array_equal(start[0], z)


@pytest.mark.parametrize("t", [1e-5, 5e-4, 2e-3, 2e-2, 0.5])
def test_truncated_normal_is_scipys(t):
    """From noise far below the bin (a normal, whole) to noise far above it (uniform on the bin)."""
    std = np.tan(0.5 * np.pi * t)
    z, log_q = truncated_normal(P.cosine(), t)(jnp.zeros((400, 1)), EPS[:, None])
    bound = HALF_BIN / std
    oracle = scipy.stats.truncnorm(-bound, bound, scale=std)
    np.testing.assert_allclose(log_q, oracle.logpdf(np.clip(z[:, 0], -HALF_BIN, HALF_BIN)), atol=2e-3)
    np.testing.assert_allclose(z[:, 0], oracle.ppf(scipy.stats.norm.cdf(EPS)), atol=1e-3 * HALF_BIN)


# --- Bounds on a rounded Gaussian, narrower than the bins ------------------------------------------------------------

LEVELS = np.arange(120, 136)
MODEL_MEAN, MODEL_STD = 0.0021, 0.6 * HALF_BIN
X0 = LEVELS / 127.5 - 1
MASS = np.diff(scipy.stats.norm(MODEL_MEAN, MODEL_STD).cdf(np.append(X0 - HALF_BIN, X0[-1] + HALF_BIN)))
COPIES = 4096
CHOSEN = np.repeat(np.arange(16), np.round(MASS * COPIES).astype(int))
ROWS = jnp.asarray(X0[CHOSEN], jnp.float32)[:, None]
# Of the rows as they are: between the entropy of MASS and what rounding COPIES * MASS makes of it.
EXACT = float(-np.log2(MASS[CHOSEN]).mean())


def log_density(z, keys):
    del keys
    return jax.scipy.stats.norm.logpdf(z, MODEL_MEAN, MODEL_STD)[:, 0]


def table(params):
    """A conditional family with its own shift and scale for each of the 16 levels."""

    def conditioner(x0):
        index = jnp.round((x0 + 1) * 127.5).astype(int) - LEVELS[0]
        return params["shift"][index], params["log_scale"][index]

    return variational(probit_affine(conditioner))


def train(steps=300):
    def loss(params, key):
        return bits_per_dim(table(params), log_density, key, ROWS).mean()

    optimizer = optax.adam(0.05)

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    params = {"shift": jnp.zeros(16), "log_scale": jnp.zeros(16)}
    keys = jax.random.split(key(1), steps)
    return jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0])()


def measured(dequantise, draws=1, seeds=8):
    """Mean bound over all rows and its standard error."""
    bits = jax.jit(lambda key: bits_per_dim(dequantise, log_density, key, ROWS, draws))
    values = np.stack([np.asarray(bits(key(100 + i)), float) for i in range(seeds)])
    return values.mean(), values.mean(1).std(ddof=1) / np.sqrt(seeds)


def test_uniform_noise_costs_its_kl():
    """By quadrature: E_u of -log2 p over each bin, against -log2 of the mean."""
    u = X0[:, None] + HALF_BIN * (2 * (np.arange(2000) + 0.5) / 2000 - 1)
    per_level = -scipy.stats.norm(MODEL_MEAN, MODEL_STD).logpdf(u).mean(1) / np.log(2) - np.log2(2 * HALF_BIN)
    bound, error = measured(uniform)
    assert bound == pytest.approx(per_level[CHOSEN].mean(), abs=4 * error + 1e-4)
    assert bound > EXACT + 0.1


def test_learned_noise_closes_most_of_the_gap():
    """EXACT < several draws of the learned < the learned < uniform: the gap shrinks to less than a fifth."""
    learned_table = table(train())
    (flat, flat_error), (learned, error), (several, several_error) = (
        measured(uniform),
        measured(learned_table),
        measured(learned_table, 8),
    )
    assert max(flat_error, error, several_error) < 0.01
    assert learned - EXACT < 0.2 * (flat - EXACT)
    assert several < learned
    assert several > EXACT - 3 * several_error


def test_more_draws_tighten_the_bound():
    one, few, many = (measured(uniform, draws)[0] for draws in (1, 4, 32))
    assert EXACT - 0.005 < many < few < one
    assert many - EXACT < 0.1 * (one - EXACT)


def test_bits_of_an_image_do_not_depend_on_its_batch():
    bits = bits_per_dim(SKEWED, log_density, key(), ROWS[:6], 2)
    np.testing.assert_allclose(bits_per_dim(SKEWED, log_density, key(), ROWS[:2], 2), bits[:2], rtol=1e-6)


def test_draws_differ_between_samples_and_draws():
    seen = []

    def spy(z, keys):
        seen.append((z, jax.random.key_data(keys)))
        return jnp.zeros(len(z))

    with jax.disable_jit():
        bits_per_dim(uniform, spy, key(), jnp.zeros((3, 1)), 2)
    z, keys = (np.concatenate(part) for part in zip(*seen, strict=True))
    assert len(np.unique(z)) == len(np.unique(keys, axis=0)) == 6

"""Densities, entropies and divergences against scipy's, torch's and numerical integration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from diffrl.rl import distributions
from diffrl.rl.environment import Actions

ACTIONS = Actions(shape=(3,), low=-2.0, high=4.0)
LINE = Actions(shape=(1,), low=-2.0, high=4.0)
FAMILIES = {
    "categorical": distributions.categorical(5),
    "normal": distributions.normal(ACTIONS),
    "squashed": distributions.squashed(ACTIONS),
}


def outputs_of(family, seed, batch=7):
    return np.random.default_rng(seed).normal(size=(batch, family.size)).astype(np.float32)


def moments(outputs):
    """Mean and deviation of the normal families in float64."""
    mean, width = np.split(np.asarray(outputs, np.float64), 2, -1)
    return mean, np.logaddexp(0, width) + 1e-3


def draws(family, outputs, num, seed=0):
    """raw [num, ...] for one row of outputs."""
    keys = jax.random.split(jax.random.key(seed), num)
    return jax.jit(lambda keys: family.sample(outputs, jax.vmap(family.noise)(keys)))(keys)


def test_the_categorical_is_scipys():
    family, outputs = FAMILIES["categorical"], outputs_of(FAMILIES["categorical"], 0)
    raw = np.arange(7) % 5
    probs = np.exp(outputs.astype(np.float64))
    probs /= probs.sum(-1, keepdims=True)
    np.testing.assert_allclose(
        family.log_prob(outputs, raw), [np.log(p[a]) for p, a in zip(probs, raw, strict=True)], rtol=1e-5
    )
    np.testing.assert_allclose(family.entropy(outputs), [scipy.stats.entropy(p) for p in probs], rtol=1e-5)
    want = [scipy.stats.entropy(p, q) for p, q in zip(probs, probs[::-1], strict=True)]
    np.testing.assert_allclose(family.kl(outputs, outputs[::-1]), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(family.mode(outputs), probs.argmax(-1))


@pytest.mark.parametrize("name", ["normal", "squashed"])
def test_the_normal_is_scipys(name):
    family = FAMILIES[name]
    outputs, raw = outputs_of(family, 1), np.random.default_rng(2).normal(size=(7, 3)).astype(np.float32)
    mean, std = moments(outputs)
    want = scipy.stats.norm(mean, std)
    np.testing.assert_allclose(family.log_prob(outputs, raw), want.logpdf(raw).sum(-1), rtol=1e-5, atol=1e-5)
    if name == "normal":
        np.testing.assert_allclose(family.entropy(outputs), want.entropy().sum(-1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(family.mode(outputs), mean, rtol=1e-6)


@pytest.mark.parametrize(("std", "error"), [(0.05, 1e-4), (0.8, 1e-3), (2.0, 0.03)])
@pytest.mark.parametrize("mean", [0.0, -1.0, 4.0])
def test_the_squashed_entropy_is_the_integral(mean, std, error):
    """Of the density of tanh(raw), which scipy knows as that of raw and the change of variables."""
    x = np.linspace(mean - 10 * std, mean + 10 * std, 20_001)
    density = scipy.stats.norm(mean, std)
    log_slope = np.log(4) - 2 * np.logaddexp(x, -x)  # 1 / cosh^2
    want = -scipy.integrate.trapezoid(density.pdf(x) * (density.logpdf(x) - log_slope), x)
    outputs = jnp.array([mean, np.log(np.expm1(std - 1e-3))], jnp.float32)
    assert abs(float(distributions.squashed(LINE).entropy(outputs)) - want) < error


def test_the_squashed_entropy_is_highest_for_nearly_even_actions():
    """A raw normal's has no end: a bonus for it would saturate the actions."""
    std = jnp.array([0.1, 0.4, 0.87, 2.0, 4.0, 8.0])
    entropy = distributions.squashed(LINE).entropy(jnp.stack([jnp.zeros(6), jnp.log(jnp.expm1(std - 1e-3))], -1))
    assert entropy.argmax() == 2
    assert np.log(2) - 0.02 < entropy[2] < np.log(2)  # the uniform's
    assert (jnp.diff(entropy[2:]) < 0).all()


def test_the_normals_divergence_is_the_integral():
    family = distributions.normal(LINE)
    p, q = np.array([0.3, -0.5], np.float32), np.array([-0.4, 0.8], np.float32)
    x = np.linspace(-15, 15, 30_001)
    log_p, log_q = (scipy.stats.norm(*(m.item() for m in moments(y))).logpdf(x) for y in (p, q))
    want = scipy.integrate.trapezoid(np.exp(log_p) * (log_p - log_q), x)
    np.testing.assert_allclose(family.kl(p, q), want, rtol=1e-5)
    assert want > 0.1  # and not the divergence of q from p
    assert abs(float(family.kl(q, p)) - want) > 0.05


@pytest.mark.oracle
@pytest.mark.parametrize("name", FAMILIES)
def test_against_torch(name):
    torch = pytest.importorskip("torch", reason="torch of the [oracles] extra is not installed")
    td = torch.distributions
    family = FAMILIES[name]
    p, q = outputs_of(family, 3), outputs_of(family, 4)

    def theirs(outputs):
        if name == "categorical":
            return td.Categorical(logits=torch.tensor(outputs))
        return td.Independent(td.Normal(*map(torch.tensor, moments(outputs))), 1)

    raw = np.asarray(family.sample(p, jax.vmap(family.noise)(jax.random.split(jax.random.key(0), 7))))
    pairs = [
        (family.log_prob(q, raw), theirs(q).log_prob(torch.tensor(raw))),
        (family.kl(p, q), td.kl_divergence(theirs(p), theirs(q))),
    ]
    if name != "squashed":
        pairs.append((family.entropy(p), theirs(p).entropy()))
    for ours, want in pairs:
        np.testing.assert_allclose(ours, want.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_have_the_density(name):
    """The entropy and the divergence are means over samples: each within four standard errors."""
    family = FAMILIES[name]
    p, q = (outputs_of(family, seed, 1)[0] for seed in (5, 6))
    raw = draws(family, p, 20_000)
    p_rows, q_rows = (jnp.broadcast_to(y, (20_000, family.size)) for y in (p, q))
    log_p, log_q = (np.asarray(family.log_prob(y, raw)) for y in (p_rows, q_rows))
    told = np.asarray(distributions.squashed_log_prob(ACTIONS, p_rows, raw)) if name == "squashed" else log_p
    for have, want in ((-told, family.entropy(p)), (log_p - log_q, family.kl(p, q))):
        assert abs(have.mean() - want) < 4 * have.std() / np.sqrt(len(have))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_distribution_does_not_diverge_from_itself(name):
    """Neither its divergence nor its slope: the trust region of TRPO stands on both."""
    family = FAMILIES[name]
    outputs = outputs_of(family, 7)
    slope = jax.grad(lambda q: family.kl(outputs, q).sum())(jnp.asarray(outputs))
    np.testing.assert_allclose(family.kl(outputs, outputs), 0, atol=1e-6)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


@pytest.mark.parametrize("outputs", [[0.4, -0.3], [2.0, 1.0], [-1.0, -3.0]])
def test_the_squashed_density_integrates_to_one(outputs):
    """Over tanh(raw) in (-1, 1), on a grid that is fine near the ends."""
    raw = np.linspace(-12, 12, 48_001).astype(np.float32)[:, None]
    log_density = distributions.squashed_log_prob(LINE, jnp.asarray(outputs), raw)
    density, at = np.exp(np.asarray(log_density, np.float64)), np.tanh(raw[:, 0].astype(np.float64))
    np.testing.assert_allclose(scipy.integrate.trapezoid(density, at), 1, atol=2e-3)
    # The probability of one half of the range, from samples.
    family, half = distributions.squashed(LINE), at > 0.2
    share = np.mean(np.tanh(np.asarray(draws(family, jnp.asarray(outputs), 20_000))) > 0.2)
    np.testing.assert_allclose(scipy.integrate.trapezoid(density[half], at[half]), share, atol=0.015)


@pytest.mark.oracle
def test_the_squashed_density_is_torchs():
    torch = pytest.importorskip("torch", reason="torch of the [oracles] extra is not installed")
    td = torch.distributions
    outputs = outputs_of(FAMILIES["squashed"], 8)
    raw = np.random.default_rng(9).normal(size=(7, 3)).astype(np.float32)
    tanh = td.TanhTransform(cache_size=1)
    want = td.Independent(td.TransformedDistribution(td.Normal(*map(torch.tensor, moments(outputs))), tanh), 1)
    at = tanh(torch.tensor(raw, dtype=torch.float64))
    ours = distributions.squashed_log_prob(ACTIONS, jnp.asarray(outputs), raw)
    np.testing.assert_allclose(ours, want.log_prob(at).numpy(), rtol=1e-4, atol=1e-4)


def test_the_squashed_density_is_finite_far_out():
    log_density = distributions.squashed_log_prob(LINE, jnp.zeros(2), jnp.array([[-40.0], [40.0]]))
    assert np.isfinite(log_density).all()


@pytest.mark.parametrize("name", ["normal", "squashed"])
def test_actions_stay_within_the_bounds(name):
    family = FAMILIES[name]
    raw = jnp.array([[-100.0, 0.0, 100.0], [-1.0, 0.5, 1.0]])
    action = np.asarray(family.action(raw))
    np.testing.assert_allclose(action[0], [-2, 1, 4], atol=1e-5)
    inner = np.tanh(raw[1]) if name == "squashed" else raw[1]
    np.testing.assert_allclose(action[1], 1 + 3 * np.asarray(inner), rtol=1e-6)


def test_the_usual_family_is_of_the_actions():
    assert distributions.of(Actions(num=4)).size == 4
    assert distributions.of(ACTIONS).size == distributions.of(ACTIONS, squash=True).size == 6
    assert float(distributions.of(ACTIONS, squash=True).action(jnp.full(3, 1.0))[0]) < 3.5
    assert float(distributions.of(ACTIONS).action(jnp.full(3, 1.0))[0]) == 4.0

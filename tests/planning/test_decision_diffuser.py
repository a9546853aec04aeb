"""Decision Diffuser: what it is told, guidance at its two ends, and inverse dynamics."""

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.diffusion import guidance, losses, prediction, samplers, times
from diffrl.diffusion import process as processes
from diffrl.diffusion.sampling import sample, sample_keys, start
from diffrl.planning import decision_diffuser
from diffrl.planning.plans import Space

PROCESS = processes.cosine()
SPACE = Space(horizon=4, actions=0, observations=2)
KEYS = sample_keys(jax.random.key(1), 4000)


def toy(x, t, cond):
    """Far from its data where it is told nothing; moved by what it is told."""
    told = cond["known"] * cond["value"][:, 0]
    return 0.5 * x + told[:, None, None]


def test_guidance_at_one_is_the_conditional_model_and_at_zero_the_unconditional():
    x, grid = start(PROCESS, KEYS[:5], (5, *SPACE.shape)), times.linear_grid(6, 0.99)
    cond = decision_diffuser.told(jnp.linspace(0.5, 1.0, 5))
    null = decision_diffuser.untold(1)

    def run(denoise, cond):
        return sample(samplers.ancestral(PROCESS, denoise, temperature=0.5), KEYS[:5], x, grid, cond)

    for scale, told in ((1.0, cond), (0.0, decision_diffuser.untold(5))):
        guided = guidance.classifier_free(toy, scale, null)
        np.testing.assert_array_equal(
            jax.jit(run, static_argnums=0)(guided, cond), jax.jit(run, static_argnums=0)(toy, told)
        )


def test_half_of_the_loss_is_each_ones_and_padding_is_no_ones():
    x = jax.random.normal(jax.random.key(2), (4000, 4, 5))
    mask = jnp.ones((4000, 4)).at[:, 3].set(0.0)
    x = jnp.where(mask[..., None] == 0, 0.0, x)
    returns, told = jnp.linspace(0.0, 1.0, 4000), []

    def model(seen, t, cond):
        assert seen.shape == (4000, 4, 2)
        told.append(cond)
        return x[..., 3:]  # right, as an x_0 head's output

    def inverse(before, after):
        np.testing.assert_array_equal(before.reshape(4000, 3, 2), x[:, :-1, 3:])
        np.testing.assert_array_equal(after.reshape(4000, 3, 2), x[:, 1:, 3:])
        return x[:, :-1, :3].at[:, 2].set(1e3).reshape(-1, 3) + 0.5  # wrong by 0.5, and nonsense before the padding

    denoising = losses.denoising(PROCESS, prediction.x0_head(PROCESS), times.uniform())
    objective = decision_diffuser.objective(denoising, SPACE, actions=3, drop=0.25)
    loss, metrics = objective(model, inverse, x, mask, returns, KEYS)
    np.testing.assert_array_equal(metrics["planning"], 0.0)
    np.testing.assert_allclose(metrics["acting"], 0.25, rtol=1e-4)
    np.testing.assert_allclose(loss, 0.125, rtol=1e-4)
    known = np.asarray(told[0]["known"])
    np.testing.assert_allclose(known.mean(), 0.75, atol=0.03)
    np.testing.assert_array_equal(told[0]["value"][:, 0], np.where(known == 1, returns, 0.0))


def test_plans_are_asked_for_by_return():
    cond = decision_diffuser.asked(0.9)(jnp.zeros((3, 4)), None, None)
    assert jax.tree.map(lambda a: a.shape, cond) == {"value": (3, 1), "known": (3,)}
    np.testing.assert_allclose(cond["value"], 0.9)


def test_the_quantile_error_is_least_at_the_quantile():
    returns = jax.random.normal(jax.random.key(5), (20_000,))
    guesses = jnp.linspace(-2.0, 2.0, 401)
    errors = jax.vmap(lambda guess: decision_diffuser.quantile_error(guess, returns, 0.9).mean())(guesses)
    np.testing.assert_allclose(guesses[errors.argmin()], np.quantile(returns, 0.9), atol=0.02)

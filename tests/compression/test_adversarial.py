"""The pair as one loss: against torch-like separate backward passes made with plain jax.grad."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.compression import adversarial


def problem():
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
    return params, jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)


SHAPES = {"encoder": (5, 4), "last": (4, 5), "critic": (5, 1)}


def features(params, x):
    return jnp.tanh(x @ params["encoder"])


def reconstruction(x):
    return lambda image: jnp.abs(image - x).mean()


def generator(params, x, weight):
    return adversarial.balanced(
        lambda kernel, h: h @ kernel,
        params["last"],
        features(params, x),
        reconstruction(x),
        lambda image: -(image @ params["critic"]).mean(),
        weight,
    )


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_gradient_is_that_of_the_two_losses(weight):
    params, x = problem()

    def separate(params, factor, which):
        image = features(params, x) @ params["last"]
        adversary = -(image @ jax.lax.stop_gradient(params["critic"])).mean()
        return (which[0] * reconstruction(x)(image)) + which[1] * factor * adversary

    norms = [jnp.linalg.norm(jax.grad(separate)(params, 1.0, which)["last"]) for which in ((1.0, 0.0), (0.0, 1.0))]
    factor = weight * norms[0] / (norms[1] + adversarial.EPS)
    (loss, found), grads = jax.value_and_grad(
        lambda p: (lambda b: (b.loss, b))(generator(p, x, weight)[1]), has_aux=True
    )(params)
    np.testing.assert_allclose(found.weight, factor, rtol=1e-5)
    np.testing.assert_allclose(loss, separate(params, factor, (1.0, 1.0)), rtol=1e-5)
    wanted = jax.grad(separate)(params, factor, (1.0, 1.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, wanted)


def test_the_critic_is_not_trained_to_please():
    params, x = problem()
    grads = jax.grad(lambda p: generator(p, x, 1.0)[1].loss)(params)
    np.testing.assert_array_equal(grads["critic"], 0.0)


def test_balance_makes_both_pushes_alike_at_the_last_layer():
    params, x = problem()
    big = generator({**params, "critic": 1e3 * params["critic"]}, x, 1.0)[1]
    small = generator(params, x, 1.0)[1]
    np.testing.assert_allclose(big.weight * 1e3, small.weight, rtol=1e-2)


def test_hinge_by_hand():
    real, fake = jnp.array([2.0, 0.5, -1.0]), jnp.array([-2.0, 0.0, 1.0])
    np.testing.assert_allclose(adversarial.hinge(real, fake), 0.5 * (2.5 / 3) + 0.5 * (3.0 / 3), rtol=1e-6)


def test_players_train_apart():
    """In one tree and one step: hinge has no gradient in the autoencoder when the caller stops the image."""
    params, x = problem()

    def loss(p):
        image, parts = generator(p, x, 1.0)
        real, fake = (y @ p["critic"] for y in (x, jax.lax.stop_gradient(image)))
        return parts.loss + adversarial.hinge(real, fake), parts

    alone = jax.grad(lambda p: adversarial.hinge(x @ p["critic"], (features(params, x) @ params["last"]) @ p["critic"]))
    grads = jax.grad(lambda p: loss(p)[0])(params)
    np.testing.assert_allclose(grads["critic"], alone(params)["critic"], rtol=1e-5)
    np.testing.assert_allclose(
        grads["encoder"], jax.grad(lambda p: generator(p, x, 1.0)[1].loss)(params)["encoder"], rtol=1e-5
    )

r"""Guidance by a likelihood p(y | x_t): classifier guidance, with a noisy classifier and through the estimate of x_0.

By Bayes' rule grad log p(x_t | y) = grad log p(x_t) + grad log p(y | x_t), and by Tweedie's formula
x_0 = (x_t + sigma^2 score) / alpha.  Hence, with a scale s that sharpens the likelihood to p(y | x_t)^s,

    x_0  <-  x_0 + s (sigma^2 / alpha) grad_{x_t} log p(y | x_t, t).

    classifier  p(y | x_t, t) is a classifier trained on noisy data (Dhariwal & Nichol, 2021, algorithm 2)
    through_x0  p(y | x_t, t) = p(y | x_0_hat(x_t), t), the likelihood of the denoiser's own estimate, differentiated
                through the denoiser: any network that knows clean data guides (Chung et al., 2023; Bansal et al., 2023)

The second is exact only where the estimate tells all that x_t tells: its p should be as wide as x_0 is uncertain given
x_t.  ADM's ancestral sampler shifts a step's mean by s Sigma grad log p instead, which is the same as steps shrink.

Likelihoods are functions `log_prob: (x [B, ...], t [B], cond) -> [B]`, up to a constant.  They need alpha(t) > 0.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffrl.diffusion.guidance import Scale, on_x0, scale_at
from diffrl.diffusion.losses import NOISE, TIME, Objective, Partial
from diffrl.diffusion.prediction import Denoiser
from diffrl.diffusion.process import Process, add_noise, scales
from diffrl.diffusion.sampling import fold, normal
from diffrl.diffusion.times import Draw

Array = jax.Array
LogProb = Callable[[Array, Array, Any], Array]
Classifier = Callable[[Array, Array], Array]  # (x_t [B, ...], t [B]) -> logits [B, K]


def _shifted(process: Process, scale: Scale, gradient: Array, estimate: Any, t: Array) -> Any:
    """`estimate` with x_0 moved along grad log p(y | x_t)."""
    alpha, sigma = scales(process, t, gradient)
    return on_x0(lambda x0: x0 + scale_at(scale, t, x0) * sigma**2 / alpha * gradient, estimate)


def classifier(process: Process, denoise: Denoiser, log_prob: LogProb, scale: Scale = 1.0) -> Denoiser:
    """Guidance by a likelihood of the noisy x_t itself: one gradient of `log_prob` beside each call of `denoise`.

    denoise: unconditional, or conditional too, for more of the same.
    scale: s, a number, [B] or a function of t; 1 is Bayes' rule.
    """

    def guided(x, t, cond):
        gradient = jax.grad(lambda x: log_prob(x, t, cond).sum())(x)
        return _shifted(process, scale, gradient, denoise(x, t, cond), t)

    return guided


def through_x0(process: Process, denoise: Denoiser, log_prob: LogProb, scale: Scale = 1.0) -> Denoiser:
    """Guidance by a likelihood of x_0_hat(x_t): one call of `denoise`, forwards and backwards.

    log_prob: (x_0_hat, t, cond) -> [B], of the estimate at time t.
    scale: as in `classifier`.
    """

    def guided(x, t, cond):
        def likelihood(x):
            estimate = denoise(x, t, cond)
            return log_prob(jax.tree.leaves(estimate)[0], t, cond).sum(), estimate

        gradient, estimate = jax.grad(likelihood, has_aux=True)(x)
        return _shifted(process, scale, gradient, estimate, t)

    return guided


# --- Noisy classifiers -----------------------------------------------------------------------------------------------


def label_log_prob(classify: Classifier) -> LogProb:
    """log p(label | x_t, t) [B] of a classifier, for integer labels [B]."""

    def log_prob(x, t, label):
        return jnp.take_along_axis(jax.nn.log_softmax(classify(x, t)), label[:, None], axis=1)[:, 0]

    return log_prob


def classification(process: Process, draw: Draw) -> Objective:
    """Cross-entropy of a noisy classifier, -log p(label | x_t, t) in nats; its `model` is (x_t, t, None) -> logits."""

    def objective(model, x0, label, keys):
        t = draw(fold(keys, TIME))
        xt = add_noise(process, x0, t, normal(fold(keys, NOISE), x0))
        logits = model(xt, t, None)
        log_prob = label_log_prob(lambda x, t: logits)(xt, t, label)
        return -log_prob, {"accuracy": (logits.argmax(axis=-1) == label).astype(logits.dtype)}

    return objective


def regression(process: Process, draw: Draw) -> Partial:
    """Squared error of a value of noisy data; its `model` is (x_t, t, None) -> [B].

    cond: the value [B] of the clean x0.  known: as in `losses.denoising`.
    """

    def objective(model, x0, cond, keys, known=None):
        t = draw(fold(keys, TIME))
        xt = add_noise(process, x0, t, normal(fold(keys, NOISE), x0))
        if known is not None:
            xt = jnp.where(known, x0, xt)
        return (model(xt, t, None) - cond) ** 2, {}

    return objective

r"""A reconstruction and its critic as one loss (VQ-GAN, Esser et al., arXiv:2012.09841, eqs. 5 to 7).

    min L_rec + lambda L_adv,   lambda = weight |dL_rec / dW| / (|dL_adv / dW| + 1e-4),   W the decoder's last layer

    L_critic = 1/2 E max(0, 1 - D(x)) + 1/2 E max(0, 1 + D(x^)),   L_adv = -E D(x^)          (hinge, arXiv:1705.02894)

Both losses are differentiated once, at the image; what reaches W is pulled back from there, and so is what reaches the
rest of the network.  The two players are two subtrees of one tree of parameters, kept apart by stopped gradients, so
that one step of the common kind trains both.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
EPS, LARGEST = 1e-4, 1e4


class Balanced(NamedTuple):
    """loss: reconstruction + weight * adversary, whose gradient is theirs; the rest for information."""

    loss: Array
    reconstruction: Array
    adversary: Array
    weight: Array


def hinge(real: Array, fake: Array) -> Array:
    """The critic's loss, from its logits of real images and of reconstructions; a scalar."""
    return 0.5 * (jax.nn.relu(1.0 - real).mean() + jax.nn.relu(1.0 + fake).mean())


def balanced(
    last: Callable,
    kernel: Array,
    features: Array,
    reconstruction: Callable[[Array], Array],
    adversary: Callable[[Array], Array],
    weight: Array | float,
) -> tuple[Array, Balanced]:
    """The image and its loss, with the adversary's weight measured at the kernel of the layer that makes the image.

    Args:
        last: (kernel, features) -> image; linear in its kernel.
        kernel, features: its parameters, and what it sees.
        reconstruction, adversary: image -> scalar.
        weight: of the adversary in units of the measured balance; 0 turns it off.
    """
    image = last(kernel, features)
    at, kernel, features = jax.lax.stop_gradient((image, kernel, features))
    # Constants, lest the critic be trained to please.
    value, slope = jax.lax.stop_gradient(jax.value_and_grad(reconstruction)(at))
    verdict, push = jax.lax.stop_gradient(jax.value_and_grad(adversary)(at))
    _, pull = jax.vjp(lambda kernel: last(kernel, features), kernel)
    sizes = [jnp.linalg.norm(pull(gradient)[0]) for gradient in (slope, push)]
    weight = weight * jnp.clip(sizes[0] / (sizes[1] + EPS), 0.0, LARGEST)
    # A number whose gradient at the image is the one just found.
    along = ((slope + weight * push) * (image - at)).sum()
    return image, Balanced(value + weight * verdict + along, value, verdict, weight)

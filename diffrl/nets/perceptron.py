"""Perceptrons of observations: policies, values and Q functions of vectors.

Orthogonal kernels of gain sqrt 2, zero biases and a last layer of its own gain are what codes of PPO start from
(Engstrom et al., arXiv:2005.12729; Andrychowicz et al., arXiv:2006.05990): a policy whose last gain is 0.01 begins
undecided.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax


def numbers(obs: Array) -> Array:
    """float32; bytes (uint8) are brought to [0, 1], everything else is taken as it is."""
    return obs.astype(jnp.float32) / 255 if obs.dtype == jnp.uint8 else obs.astype(jnp.float32)


@jax.custom_jvp
def product(x: Array, weights: Array) -> Array:
    """x [B, D] with weights [D, E]: [B, E], whose gradient in the weights is fast on a CPU as well.

    That gradient is x^T g.  Written as autodiff does, with the first axis of both summed over, XLA's CPU compiler
    leaves it to a kernel that is two to ten times slower than the one it has for ordinary products, the more so the
    fewer columns g has.  There x is transposed first.
    """
    return x @ weights


@product.defjvp
def _product_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    x, weights = primals
    dx, dweights = tangents
    return x @ weights, dx @ weights + lax.platform_dependent(x, dweights, cpu=_turned, default=jnp.matmul)


def _turned(x: Array, weights: Array) -> Array:
    """x @ weights, whose transpose in the weights is an ordinary product, of the smaller of x and g turned.

    Barriers keep the compiler from folding the turn into the product.
    """
    rows, columns = weights.shape
    if rows <= columns:
        return lax.dot_general(lax.optimization_barrier(x.T), weights, (((0,), (0,)), ((), ())))
    turned = lax.optimization_barrier(weights.T)
    return lax.optimization_barrier(lax.dot_general(turned, x, (((1,), (1,)), ((), ())))).T


def _dot_general(x: Array, weights: Array, *_: Any, **__: Any) -> Array:
    return product(x, weights)


def kernel(scale: float, orthogonal: bool) -> Callable[..., Array]:
    """An initialiser: orthogonal of gain `scale`, or normal of variance scale^2 / fan-in (LeCun et al., 1998)."""
    if not orthogonal:
        return nn.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal")
    make = nn.initializers.orthogonal(scale)

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        # Seeds of a population get theirs one after the other: jaxlib factorises a batch of matrices in its pool of
        # threads from within that pool, and two at a time wait for one another for ever where there are two cores.
        return jax.custom_batching.sequential_vmap(lambda key: make(key, shape, dtype))(key)

    return init


def hidden(orthogonal: bool) -> Callable[..., Array]:
    """The initialiser of hidden layers: of gain sqrt 2 where it is orthogonal, else of 1."""
    return kernel(math.sqrt(2) if orthogonal else 1.0, orthogonal)


class Perceptron(nn.Module):
    """obs [B, ...] -> [B, outputs] float32; what an observation holds is flattened.

    Attributes:
        outputs: how many.
        widths: of the hidden layers.
        activation: between the layers.
        out_scale: gain of the last layer's kernel: 0.01 for PPO's policies, 1 for values.
        orthogonal: kernels of the hidden layers are orthogonal of gain sqrt 2; else LeCun's normals.
        free_std: the last so many outputs are parameters, the same for every observation, 0 at first: the deviations
            of a Gaussian policy that does not look where it explores.
    """

    outputs: int
    widths: tuple[int, ...] = (64, 64)
    activation: Callable[[Array], Array] = nn.tanh
    out_scale: float = 1.0
    orthogonal: bool = True
    free_std: int = 0

    @nn.compact
    def __call__(self, obs: Array) -> Array:
        h = numbers(obs).reshape(obs.shape[0], -1)
        for i, width in enumerate(self.widths):
            h = self.activation(
                nn.Dense(width, kernel_init=hidden(self.orthogonal), dot_general=_dot_general, name=f"hidden_{i}")(h)
            )
        out = kernel(self.out_scale, self.orthogonal)
        y = nn.Dense(self.outputs - self.free_std, kernel_init=out, dot_general=_dot_general, name="out")(h)
        if not self.free_std:
            return y
        free = self.param("free", nn.initializers.zeros_init(), (self.free_std,))
        return jnp.concatenate([y, jnp.broadcast_to(free, (*y.shape[:-1], self.free_std))], axis=-1)

"""Discrete latents: the nearest of K codes, which follow what is assigned to them (VQ-VAE, van den Oord et al.,
arXiv:1711.00937).

    z_q = z + stop(e_k - z),   k = argmin_k |z - e_k|²                 (straight through, eq. 2)
    N_k <- d N_k + (1 - d) n_k,   m_k <- d m_k + (1 - d) sum z,   e_k = m_k / N_k       (appendix A.1)

over the n_k vectors z assigned to code k.  A code that hardly anything is assigned to is dead, and starts again at a
random vector of the batch (Jukebox, arXiv:2005.00341); a new codebook is all dead, so that the first batch fills it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Codebook(NamedTuple):
    """codes [K, D]; counts [K] and sums [K, D]: averages of how many vectors a step gives to each, and of their sum."""

    codes: Array
    counts: Array
    sums: Array


class Quantised(NamedTuple):
    """z [..., D]: codes, with the gradient of what they stand for; indices [...]; distance [...]: |z - e_k|² / D."""

    z: Array
    indices: Array
    distance: Array


def create(size: int, channels: int) -> Codebook:
    """A codebook of dead codes."""
    return Codebook(jnp.zeros((size, channels)), jnp.zeros(size), jnp.zeros((size, channels)))


def nearest(codes: Array, z: Array) -> Array:
    """Indices [...] int32 of the codes [K, D] that are nearest to z [..., D]."""
    # |z|² is the same for all codes.  The products in full precision: near ties decide which code lives.
    products = jnp.einsum("...d,kd->...k", z, codes, precision="highest")
    return jnp.argmin((codes**2).sum(-1) - 2.0 * products, axis=-1).astype(jnp.int32)


def quantise(codes: Array, z: Array) -> Quantised:
    """The nearest code of every z [..., D].

    `distance` has a gradient in z only: its mean times a weight is the commitment loss (eq. 3's last term).
    """
    indices = nearest(codes, jax.lax.stop_gradient(z))
    chosen = jax.lax.stop_gradient(codes)[indices]
    distance = ((z - chosen) ** 2).mean(-1)
    return Quantised(z + jax.lax.stop_gradient(chosen - z), indices, distance)


def update(
    book: Codebook, z: Array, indices: Array, key: Array, decay: Array | float = 0.99, dead: float = 0.03
) -> Codebook:
    """The codebook after a batch.

    Args:
        z, indices: [..., D] and [...], what was assigned to which code.
        decay: of the averages; counts and sums before it and after.
        dead: codes with fewer than this share of the average count are replaced.

    Over devices mapped by hand (`shard_map`), each would replace dead codes by vectors of its own.
    """
    size, channels = book.codes.shape
    z = jax.lax.stop_gradient(z).reshape(-1, channels)
    rows = jax.nn.one_hot(indices.reshape(-1), size, dtype=z.dtype)
    counts = decay * book.counts + (1 - decay) * rows.sum(0)
    sums = decay * book.sums + (1 - decay) * jnp.einsum("nk,nd->kd", rows, z, precision="highest")
    average = len(z) / size
    gone = counts < dead * average
    fresh = z[jax.random.randint(key, (size,), 0, len(z))]
    counts = jnp.where(gone, average, counts)
    sums = jnp.where(gone[:, None], fresh * average, sums)
    return Codebook(sums / counts[:, None], counts, sums)


def usage(indices: Array, size: int) -> tuple[Array, Array]:
    """The share of the codes that occur, in [0, 1], and their perplexity exp(-sum p log p), in [1, size]."""
    counts = jnp.zeros(size).at[indices.reshape(-1)].add(1.0)
    p = counts / counts.sum()
    return (counts > 0).mean(), jnp.exp(-jax.scipy.special.xlogy(p, p).sum())

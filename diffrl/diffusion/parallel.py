r"""Sampling in parallel in time: Picard iteration over a sliding window of steps (ParaDiGMS; Shih et al., 2023).

A one-step sampler is x_{n+1} = F_n(x_n), its noise fixed by the key of (sample, step).  Picard's iteration guesses a
whole stretch of the path and mends all of it at once,

    x_{n+1}  <-  x_0 + sum_{m <= n} (F_m(x_m) - x_m),

with every F_m at the old guesses: W steps of the sampler in one batched network call.  Its fixed point is the
sequential path, and after k rounds the first k steps equal it whatever the guesses were; where the path is smooth
many more do.  The window starts at the first step that is not settled, so that steps leave it as soon as they have
stopped changing, and the guesses for those that enter are the last state known.

Fewer rounds for more work: worth it where a batch of W network calls takes hardly longer than one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffrl.diffusion.process import expand
from diffrl.diffusion.sampling import Sampler, fold, one_step, sample_keys
from diffrl.errors import UserError

Array = jax.Array


def sample_parallel(
    sampler: Sampler,
    key: Array,
    x: Array,
    times: Array,
    cond: Any = None,
    window: int = 64,
    tolerance: float | Array = 1e-3,
    place: Callable[[Array], Array] = lambda states: states,
) -> tuple[Array, Array]:
    """What `sampling.sample` returns, to `tolerance`, and the number of rounds: sequential calls of the sampler's step.

    Arguments up to `cond` are those of `sampling.sample`, with the same noise.
    window: W, how many steps a round takes at once; 1 is the sequential sampler.
    tolerance: a state is settled when a round changes no sample of it by more than this part of the batch's root mean
      square.  At 0 the samples are the sequential ones up to rounding, in at most N rounds.
    place: applied to the states [W, B, ...] before they are stepped; a caller with several devices spreads the window
      over them here, with `train.mesh.spread`.  (Or it spreads x and the keys, over the batch.)

    Raises:
      UserError: the sampler remembers earlier steps, or there is no window.
    """
    initial = one_step(sampler, x, "sample_parallel")
    if window < 1:
        raise UserError(f"window={window}: choose at least 1, which is the sequential sampler")
    keys, num = sample_keys(key, x.shape[0]), len(times) - 1
    window = min(window, num)
    offsets = jnp.arange(window)

    def advance(n, x):
        return sampler.step(fold(keys, n), initial._replace(x=x), times[n], times[n + 1], cond)[0].x

    def mend(first, path):
        """New guesses for the W states after path[0], which is final: that before step `first`."""
        n, old = first + offsets, place(path[:-1])
        new = jax.vmap(advance)(jnp.minimum(n, num - 1), old)
        # The first needs no sum, which would round; steps beyond the last do not move.
        moving = (offsets > 0) & (n < num)
        return new[0] + jnp.cumsum(jnp.where(expand(moving, old), new - old, 0.0), axis=0)

    def one_round(carry):
        first, path, rounds = carry
        guesses = mend(first, path)
        settled = _small(guesses - path[1:], guesses, tolerance)
        done = jnp.maximum(1, jnp.cumprod(settled.astype(jnp.int32)).sum())
        path = jnp.concatenate([path[:1], guesses])
        return first + done, path[jnp.minimum(done + jnp.arange(window + 1), window)], rounds + 1

    path = jnp.broadcast_to(initial.x, (window + 1, *initial.x.shape))
    start = (jnp.zeros((), jnp.int32), path, jnp.zeros((), jnp.int32))
    _, path, rounds = jax.lax.while_loop(lambda carry: carry[0] < num, one_round, start)
    return path[0], rounds


def _small(change: Array, x: Array, tolerance: float | Array) -> Array:
    """Of changes [W, B, ...], whether each sample's root mean square is within `tolerance` of the batch's: [W]."""
    squares, size = ((a**2).reshape(*a.shape[:2], -1).mean(axis=-1) for a in (change, x))
    return (squares <= tolerance**2 * size.mean(axis=1, keepdims=True)).all(axis=1)

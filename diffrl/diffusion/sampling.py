"""What a sampler is, the one loop over time, and the randomness of samples.

Every sample owns a key; step n of sample i draws from fold_in(key_i, n).  Sample i's noise is therefore bitwise the
same whatever the batch size or the number of devices, and a large job can be cut into chunks that keep their ids.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffrl.diffusion.process import Process
from diffrl.errors import UserError

Array = jax.Array

# What keys are folded with for other ends than to count steps, moves or draws 0, 1, 2, ...: x at the grid's start, the
# known part of an image, churn, a corrector, a proposal and its test.  They lie where no count reaches.
START, KNOWN, CHURN, CORRECTOR, PROPOSE, ACCEPT = (np.uint32(2**32 - n) for n in range(1, 7))


class State(NamedTuple):
    """x [B, ...], and what a multistep method remembers."""

    x: Array
    memory: Any = ()


class Info(NamedTuple):
    """The step's Gaussian N(mean, std^2), std broadcasting against mean, and the estimate of x_0 behind it."""

    x0: Array
    mean: Array
    std: Array


class Sampler(NamedTuple):
    """init: x -> state.  step: (keys [B], state, t, s, cond) -> (state, info), from time t to time s, both scalars."""

    init: Callable[[Array], State]
    step: Callable[[Array, State, Array, Array, Any], tuple[State, Info]]


def sample_keys(key: Array, batch: int) -> Array:
    """[B] keys from one key, by fold_in(key, i); [B] keys are passed through."""
    if key.ndim:
        return key
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))


def fold(keys: Array, data: Any) -> Array:
    """fold_in(key_i, data) for each of the keys [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def normal(keys: Array, x: Array) -> Array:
    """Standard normal noise like `x` [B, ...], sample i's from key i."""
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)


def rademacher(keys: Array, x: Array) -> Array:
    """Random signs like `x` [B, ...], sample i's from key i."""
    return jax.vmap(lambda key: jax.random.rademacher(key, x.shape[1:], x.dtype))(keys)


def per_sample(t: ArrayLike, x: Array) -> Array:
    """A scalar time as the [B] that denoisers take, in the type of `x` [B, ...]."""
    return jnp.full(x.shape[:1], t, x.dtype)


def one_step(sampler: Sampler, x: Array, caller: str) -> State:
    """The first state of a sampler that remembers nothing, as `caller` needs it.

    Raises:
      UserError: the sampler remembers earlier steps.
    """
    state = sampler.init(x)
    if jax.tree.leaves(state.memory):
        raise UserError(f"{caller} needs a one-step sampler, and this one has a memory: take ddim, ancestral or heun")
    return state


def start(process: Process, key: Array, shape: tuple[int, ...], t: ArrayLike = 1.0, dtype=jnp.float32) -> Array:
    """x_t ~ N(0, alpha(t)^2 + sigma(t)^2) of `shape` [B, ...]: where a sampler starts.

    That is what data of unit variance become, and the prior of the bound; under a variance-preserving process N(0, I).
    """
    like, t = jnp.zeros(shape, dtype), jnp.asarray(t)
    std = jnp.hypot(process.alpha(t), process.sigma(t)).astype(dtype)
    return std * normal(fold(sample_keys(key, shape[0]), START), like)


def sample(
    sampler: Sampler,
    key: Array,
    x: Array,
    times: Array,
    cond: Any = None,
    trace: bool | Callable[[Array, Info], Any] = False,
) -> Any:
    """Walks `sampler` along `times` [N + 1] from `x` [B, ...] (see `start`), in one scan.

    key: one key (sample i uses fold_in(key, i)) or [B] keys.  cond: a tree whose leaves have leading axis B.
    times: strictly falling, for the samplers that walk from noise to data.
    Returns x at times[-1]; with `trace=True` also (x, info) after every step, stacked on a new leading axis [N], or,
    where `trace` is a function, what it keeps of (x, info).
    """
    keys = sample_keys(key, x.shape[0])
    keep = trace if callable(trace) else (lambda x, info: (x, info))

    def body(state, step):
        n, t, s = step
        state, info = sampler.step(fold(keys, n), state, t, s, cond)
        return state, keep(state.x, info) if trace else None

    steps = (jnp.arange(len(times) - 1), times[:-1], times[1:])
    state, kept = jax.lax.scan(body, sampler.init(x), steps)
    return (state.x, kept) if trace else state.x

"""Decision Diffuser (Ajay et al., 2023, arXiv:2211.15657): plans are observations alone, asked for by their return.

The diffusion model is told the return of a trajectory, or now and then nothing, so that classifier-free guidance can
ask for a high one; actions come from an inverse model a = f(o, o') of two neighbouring observations.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffrl.diffusion.guidance import drop_condition
from diffrl.diffusion.losses import Partial, weighted_mean
from diffrl.diffusion.sampling import fold
from diffrl.planning.plans import Space, known

Array = jax.Array
Inverse = Callable[[Array, Array], Array]  # (o [N, S], o' [N, S]) -> a [N, A], all normalised

DROP = 203  # what a sample's key is folded with, beyond the purposes of `losses`


def told(returns: Array) -> dict[str, Array]:
    """The condition of plans whose normalised returns [B] are given."""
    return {"value": returns[:, None], "known": jnp.ones_like(returns)}


def untold(batch: int) -> dict[str, Array]:
    """The condition of `batch` plans of which nothing is known: the null of classifier-free guidance."""
    return {"value": jnp.zeros((batch, 1)), "known": jnp.zeros((batch,))}


def objective(
    denoising: Partial, space: Space, actions: int, drop: float = 0.25
) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """(model, inverse, x [B, H, A + S], mask [B, H], returns [B], keys [B]) -> (loss [B], metrics).

    The mean of both errors, as in the paper's code; the first observation is pinned.

    Args:
        denoising: `losses.denoising`.
        space: of plans, which hold no actions.
        actions: A, how many numbers of x are actions, first in every step.
        drop: how often the model is told nothing.
    """

    def compute(model, inverse, x, mask, returns, keys):
        taken, seen = x[..., :actions], x[..., actions:]
        cond = drop_condition(fold(keys, DROP), told(returns), untold(1), drop)
        planned, metrics = denoising(model, seen, cond, keys, known=known(space, mask, goal=False))
        acted = inverse_error(inverse, taken, seen, mask)
        return 0.5 * (planned + acted), {**metrics, "planning": planned, "acting": acted}

    return compute


def inverse_error(inverse: Inverse, actions: Array, observations: Array, mask: Array) -> Array:
    """Mean squared error [B] of the actions between neighbouring observations of windows [B, H, ...]."""
    batch, horizon, size = observations.shape
    before, after = observations[:, :-1].reshape(-1, size), observations[:, 1:].reshape(-1, size)
    guess = inverse(before, after).reshape(batch, horizon - 1, -1)
    return weighted_mean((guess - actions[:, :-1]) ** 2, mask[:, 1:, None])


def asked(target: float) -> Callable[[Array, Any, Any], Any]:
    """`cond` of `diffuser.planner`: plans of normalised return `target`, from wherever they begin."""
    return lambda obs, *_: told(jnp.full(obs.shape[:1], target, jnp.float32))


def quantile_error(guess: Array, returns: Array, quantile: float) -> Array:
    """[B], least on average where `guess` is that quantile of the returns (Koenker & Bassett, 1978).

    What can be had depends on where a plan begins.  Asked for more, guidance gives up the start: its plans jump.  So
    the model may be asked for a high quantile of what demonstrations have had from there.
    """
    above = returns - guess
    return jnp.maximum(quantile * above, (quantile - 1) * above)

"""Diffuser (Janner et al., 2022, arXiv:2205.09991): plans are samples of a diffusion model of trajectories.

A plan begins at what is observed and, where there is a goal, ends there: both are pinned, clean at every noise level,
in training as in sampling.  A value guides it, by Diffuser's climb before each step or through the denoiser; of several
candidates the best is taken.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.diffusion.constraints import pinned, sdedit_start
from diffrl.diffusion.losses import Partial
from diffrl.diffusion.process import Process
from diffrl.diffusion.sampling import Sampler, fold, sample, start
from diffrl.errors import UserError
from diffrl.planning.plans import Space, known, pins, shifted

Array = jax.Array

# What a sample's key is folded with, beyond the purposes of `losses`.
ARRIVAL, CANDIDATE = 201, 202


class Planner(NamedTuple):
    """For B worlds at a time; plan i draws from key i alone.

    Attributes:
        space: of its plans.
        plan: (keys [B], obs [B, S], goal [B, S] or None, arrival or None) -> x [B, H, A + S], normalised.
        again: (keys, obs, goal, arrival, x, rows) -> x: a new plan from the one of `rows` rows ago.
    """

    space: Space
    plan: Callable[..., Array]
    again: Callable[..., Array]


class Draws(NamedTuple):
    """How plans are drawn.

    Attributes:
        process: of the diffusion.
        sampler: fixed entries [B, H, A + S] -> Sampler, to be pinned there.
        times: the grid of a plan from noise [N + 1].
        warm_times: the grid of a plan from the plan before, which begins where that is noised to; None: from noise too.
        temperature: factor on the noise that plans begin with.
        candidates: plans per world, of which the best is taken.
        score: (x [B, H, A + S], goal [B, S] or None) -> [B], by which candidates are ranked.
    """

    process: Process
    sampler: Callable[[Array], Sampler]
    times: Array
    warm_times: Array | None = None
    temperature: float = 1.0
    candidates: int = 1
    score: Callable[[Array, Array | None], Array] | None = None


def objective(
    denoising: Partial,
    space: Space,
    *,
    goal: bool = True,
    any_arrival: bool = False,
    action_weight: float = 1.0,
    discount: float = 1.0,
) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """(model, x [B, H, A + S], mask [B, H], cond, keys [B]) -> (loss [B], metrics): denoising with the ends pinned.

    Args:
        denoising: `losses.denoising`.
        goal: plans end at a goal.
        any_arrival: for every other window the goal's row is drawn from 1 ... H - 1, so that the goal may be pinned
            anywhere; else it is the last.  The model is then told goal and row, `told`, as its cond: in noise it could
            not find them.
        action_weight: of the first action's error, the one that is carried out (10 in the paper's locomotion).
        discount: of the error's weight from step to step.
    """
    fading = discount ** np.arange(space.horizon)
    weights = np.repeat((fading / fading.mean())[:, None], space.shape[1], axis=1).astype(np.float32)
    weights[0, : space.actions] = action_weight

    def compute(model, x, mask, cond, keys):
        arrival = None
        if goal and any_arrival:
            arrival = jax.vmap(_draw_arrival, (0, None))(fold(keys, ARRIVAL), space.horizon)
            seen = jnp.take_along_axis(x, arrival[:, None, None], axis=1)[:, 0, space.actions :]
            cond = told(space, seen, arrival)
        return denoising(model, x, cond, keys, known=known(space, mask, arrival, goal), elements=weights)

    return compute


def told(space: Space, goal: Array, arrival: Array | int | None = None) -> dict[str, Array]:
    """The condition of a model whose goals may be anywhere: {"value": [B, S + 1], "known": [B]}.

    goal: [B, S], normalised.  arrival: its row, [B] or a number; None: the last.
    """
    row = jnp.broadcast_to(jnp.asarray(space.horizon - 1 if arrival is None else arrival), goal.shape[:1])
    when = 2.0 * row / (space.horizon - 1) - 1.0
    return {"value": jnp.concatenate([goal, when[:, None]], axis=1), "known": jnp.ones_like(when)}


def _draw_arrival(key: Array, horizon: int) -> Array:
    which, when = jax.random.split(key)
    return jnp.where(jax.random.bernoulli(which), horizon - 1, jax.random.randint(when, (), 1, horizon))


def planner(space: Space, draws: Draws, cond: Callable[[Array, Any, Any], Any] = lambda *_: None) -> Planner:
    """A planner that samples.

    cond: (obs [B, S] where plans begin, goal [B, S] or None, its row or None) -> the denoiser's condition.

    Raises:
        UserError: candidates below 1, or several and nothing to rank them by.
    """
    count, score = draws.candidates, draws.score
    if count < 1:
        raise UserError(f"candidates={count}: draw at least one plan")
    if count > 1 and score is None:
        raise UserError(f"candidates={count}: nothing ranks them here; take 1, or give a value")

    def draw(keys, x, grid, obs, goal, arrival):
        value, mask = pins(space, obs, goal, arrival)
        return sample(pinned(draws.sampler(mask), value, mask), keys, x, grid, cond(obs, goal, arrival))

    def best(keys, begin, grid, obs, goal, arrival):
        if count == 1 or score is None:
            return draw(keys, begin(keys), grid, obs, goal, arrival)
        batch = len(keys)
        many = jax.vmap(lambda n: fold(fold(keys, CANDIDATE), n), out_axes=1)(jnp.arange(count)).reshape(-1)
        wide, aims = (None if a is None else jnp.repeat(a, count, axis=0) for a in (obs, goal))
        if arrival is not None:
            arrival = jnp.repeat(jnp.broadcast_to(jnp.asarray(arrival), (batch,)), count)
        x = draw(many, begin(many), grid, wide, aims, arrival)
        scores = score(x, aims).reshape(batch, count)
        x = x.reshape(batch, count, *space.shape)
        return jnp.take_along_axis(x, scores.argmax(1)[:, None, None, None], axis=1)[:, 0]

    def plan(keys, obs, goal=None, arrival=None):
        def noise(keys):
            return draws.temperature * start(draws.process, keys, (len(keys), *space.shape), draws.times[0])

        return best(keys, noise, draws.times, obs, goal, arrival)

    def again(keys, obs, goal, arrival, x, rows):
        times = draws.warm_times
        if times is None:
            return plan(keys, obs, goal, arrival)
        before = shifted(x, rows)

        def noised(keys):
            wide = jnp.repeat(before, len(keys) // len(before), axis=0)
            return sdedit_start(draws.process, keys, wide, times[0])

        return best(keys, noised, times, obs, goal, arrival)

    return Planner(space, plan, again)

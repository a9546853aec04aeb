"""From plans to actions: what is done at each step of a plan, and when a new one is made.

    open loop         one plan, carried out to its end and beyond
    receding horizon  a new plan every few steps, from where the world is by then
    warm start        the same, but from the plan before: shifted, noised part of the way and denoised again

All are controllers (`rl.controllers`), so that planning, acting and the world's own steps are one compiled program.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffrl.diffusion.sampling import fold
from diffrl.errors import UserError
from diffrl.planning.decision_diffuser import Inverse
from diffrl.planning.diffuser import Planner
from diffrl.planning.plans import Plan, Space, unpack
from diffrl.rl.controllers import Controller
from diffrl.rl.environment import State

Array = jax.Array
Act = Callable[[Plan, Array, Array], Array]  # (plan [B, N, ...], its age in steps, obs [B, S]) -> actions [B, A]


class Carry(NamedTuple):
    """x: the plan, normalised.  plan: in the world's units.  age, time: steps since it was made, and in all."""

    x: Array
    plan: Plan
    age: Array
    time: Array


def planned_actions(plan: Plan, age: Array, obs: Array) -> Array:
    """The plan's own actions; the last one for ever after its end."""
    return plan.actions[:, jnp.minimum(age, plan.actions.shape[1] - 1)]


def towards_waypoints(gain: float = 1.0) -> Act:
    """Diffuser's controller for Maze2D: a = gain (x' - x) + (v' - v) towards the next step of the plan, (x', v').

    Observations are two positions and two velocities.  After its end, towards its last position, at rest.

    gain: 1 in the paper's code, whose plans hardly need a correction: it takes the ball a second to make up for a
        difference in place.  A plan that jumps, as that of a model in its first minutes does, wants a stiffer one.
    """

    def act(plan: Plan, age: Array, obs: Array) -> Array:
        last = plan.observations.shape[1] - 1
        aim = plan.observations[:, jnp.minimum(age + 1, last)]
        aim = jnp.where(age + 1 > last, aim.at[:, 2:].set(0.0), aim)
        return gain * (aim[:, :2] - obs[:, :2]) + (aim[:, 2:] - obs[:, 2:])

    return act


def inverse_dynamics(space: Space, inverse: Inverse) -> Act:
    """Decision Diffuser's: the action that leads from what is observed to where the plan is one row later."""

    def act(plan: Plan, age: Array, obs: Array) -> Array:
        after = plan.observations[:, jnp.minimum(age + space.stride, plan.observations.shape[1] - 1)]
        return space.decode_action(inverse(space.encode(obs), space.encode(after)))

    return act


def controller(
    planner: Planner,
    act: Act,
    every: int | Array = 0,
    *,
    goal: Callable[[State], Array] | None = None,
    remaining: int = 0,
) -> Controller:
    """A controller that plans.

    Args:
        act: what is done of a plan.
        every: steps from one plan to the next; 0: the first is the only one.  Inside jit it may be an argument, so that
            one program serves all; `check_every` then belongs outside.
        goal: the worlds' State -> where they are to go, as observations [B, S].
        remaining: 0: every plan is at the goal in its last step, so that the goal moves away with the horizon.  Else
            the goal is pinned where it was at first, a plan's length after the episode's begin, and a plan stays there,
            which no demonstration does; fewer than `remaining` steps before, no new plan is made.  The model must have
            been trained with `any_arrival`.

    Raises:
        UserError: a plan that ends before the next is made or between two of its rows, or a `remaining` beyond it.
    """
    span, stride = planner.space.span, planner.space.stride
    if isinstance(every, int):
        check_every(planner.space, every)
    if not 0 <= remaining <= span:
        raise UserError(f"remaining={remaining}: choose 0 to {span}, the last step of a plan")

    def target(world: State) -> Any:
        return None if goal is None else goal(world)

    def made(x: Array, time: Array) -> Carry:
        return Carry(x, unpack(planner.space, x), jnp.zeros((), jnp.int32), time)

    def init(keys: Array, world: State) -> Carry:
        # Drawn from the key that `begin` has; later plans have those of their steps.
        return made(planner.plan(keys, world.obs, target(world), None), jnp.zeros((), jnp.int32))

    def step(carry: Carry, world: State, keys: Array) -> tuple[Array, Carry]:
        def anew() -> Carry:
            arrival = jnp.maximum((span - carry.time) // stride, 1) if remaining else None
            aim = target(world)
            new = made(planner.again(fold(keys, 0), world.obs, aim, arrival, carry.x, carry.age // stride), carry.time)
            return new if arrival is None else new._replace(plan=_staying(new.plan, arrival * stride, aim))

        if not isinstance(every, int) or every:
            due = (carry.age >= every) & (every > 0) & ((remaining == 0) | (span - carry.time >= remaining))
            carry = jax.lax.cond(due, anew, lambda: carry)
        action = act(carry.plan, carry.age, world.obs)
        return action, carry._replace(age=carry.age + 1, time=carry.time + 1)

    return Controller(init, step)


def _staying(plan: Plan, arrival: Array, goal: Array) -> Plan:
    """The plan that is at `goal` [B, S] from step `arrival` on."""
    steps = jnp.arange(plan.observations.shape[1])[None, :, None]
    return plan._replace(observations=jnp.where(steps >= arrival, goal[:, None], plan.observations))


def plans_made(space: Space, steps: int, *, every: int, remaining: int = 0) -> int:
    """How many plans `controller` makes in an episode of so many steps."""
    last = min(steps - 1, space.span - remaining) if remaining else steps - 1
    return 1 + last // every if every else 1


def check_every(space: Space, every: int) -> None:
    """Raises UserError for plans that end before the next is made, or are left between two of their rows."""
    if not 0 <= every <= space.span:
        raise UserError(f"a new plan every {every} steps: choose 1 to {space.span}, which is what a plan covers, or 0")
    if every % space.stride:
        raise UserError(
            f"a new plan every {every} steps: choose a multiple of {space.stride}, the steps between its rows"
        )

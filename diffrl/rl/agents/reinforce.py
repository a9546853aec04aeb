"""REINFORCE (Williams, 1992): the policy gradient from whole episodes, with or without a baseline.

    grad J  =  E sum_t grad log pi(a_t | x_t) (G_t - b(x_t)),        G_t = r_t + discount G_{t+1}.

b = 0, or a network that regresses on G.  The gradient's expectation is the same for every b and its variance is not.
The factor discount^t before each term is left out, as it is everywhere (Thomas, 2014).

A rollout is cut where it happens to end, and G_t of an episode that is still going on is not known: only steps whose
episode ended within the rollout count, and where there is none nothing is learned.  Late steps therefore count only if
their episode was about to end; this bias towards short episodes goes when rollouts are several episodes long, and with
`horizon`.

A truncated episode would have gone on.  The baseline's value of its last observation stands for that; without a
baseline nothing does, and a time limit is then learned as if it were part of the world.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffrl.errors import UserError
from diffrl.rl import policies, returns
from diffrl.rl.agent import Agent, Network, Transition, separate
from diffrl.rl.distributions import Distribution

Array = jax.Array


class State(NamedTuple):
    """Parameters {"policy", "value"} and the optimiser's state; without a baseline "value" is empty."""

    params: Any
    opt_state: Any


def reinforce(
    policy: Network,
    distribution: Distribution,
    optimizer: optax.GradientTransformation,
    discount: Any = 0.99,
    baseline: Network | None = None,
    *,
    entropy: Any = 0.0,
    value_weight: Any = 0.5,
    horizon: int | None = None,
) -> Agent:
    """The agent.  `discount`, `entropy` and `value_weight` may be traced (see `driver.many`).

    Args:
        optimizer: of the policy and the baseline together.
        baseline: a network with one output.
        entropy, value_weight: of the policy's entropy and of (b - G)^2 / 2 in the loss, both means over steps.
        horizon: the most steps that an episode can have; then only the rows of a rollout [T, N] count from which any
            episode ends in time, T - horizon + 1 of them, and nothing is biased.  None = every step that can count.

    Raises:
        UserError: when traced, a rollout shorter than `horizon`.
    """
    network = separate(policy, _nothing() if baseline is None else baseline)

    def init(key: Array) -> State:
        params = network.init(key)
        return State(params, optimizer.init(params))

    def objective(params: Any, rollout: Transition, counts: Array) -> tuple[Array, dict[str, Array]]:
        outputs, value = policies.over_time(network.both)(params, rollout.obs)
        v_t = policies.over_time(network.value)(params, rollout.next_obs)
        discount_t = discount * (1 - rollout.terminated)
        target = returns.lambda_returns(rollout.reward, discount_t, v_t, rollout.truncated, 1.0)
        target = jax.lax.stop_gradient(target)
        advantage = target - jax.lax.stop_gradient(value)

        def mean(x: Array) -> Array:
            return jnp.sum(jnp.where(counts, x, 0.0)) / jnp.maximum(counts.sum(), 1)

        policy_loss = -mean(distribution.log_prob(outputs, rollout.info["raw"]) * advantage)
        value_loss = 0.5 * mean(jnp.square(value - target))
        spread = mean(distribution.entropy(outputs))
        total = policy_loss - entropy * spread + value_weight * value_loss
        told = {"loss": total, "policy_loss": policy_loss, "value_loss": value_loss, "entropy": spread}
        return total, told | {"counted": counts.mean(), "mean_return": mean(target)}

    def update(state: State, rollout: Transition, key: Array) -> tuple[State, dict[str, Array]]:
        counts = ends_within(rollout.terminated | rollout.truncated, horizon)
        grads, told = jax.grad(objective, has_aux=True)(state.params, rollout, counts)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = State(optax.apply_updates(state.params, updates), opt_state)
        # Not even momentum moves anything on a rollout that says nothing.
        state = jax.tree.map(lambda old, new: jnp.where(counts.any(), new, old), state, new)
        return state, told | {"grad_norm": optax.global_norm(grads)}

    act, greedy, noise = policies.acting(network, distribution)
    return Agent(init, act, update, greedy, noise)


def ends_within(done: Array, horizon: int | None = None) -> Array:
    """Which steps [T, N] count: those whose episode ends within the rollout, in its first T - horizon + 1 rows."""
    steps = done.shape[0]
    if horizon is not None and horizon > steps:
        raise UserError(f"a rollout of {steps} steps for episodes of up to {horizon}: unroll at least {horizon} steps")
    ends = jnp.cumsum(done[::-1], axis=0)[::-1] > 0
    if horizon is None:
        return ends
    return ends & (jnp.arange(steps) <= steps - horizon)[:, None]


def _nothing() -> Network:
    """The baseline that is 0 and has nothing to learn."""

    def zeros(_: Any, obs: Any) -> Array:
        return jnp.zeros((jax.tree.leaves(obs)[0].shape[0], 1))

    return Network(lambda key: {}, zeros)

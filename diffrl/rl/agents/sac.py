"""Soft actor-critic with a temperature that adjusts itself (Haarnoja et al., arXiv:1801.01290 and arXiv:1812.05905).

The policy earns rewards and, at a price of alpha, entropy.  With a' ~ pi(x'), a ~ pi(x), twins q_1 and q_2 and targets
q'_1 and q'_2 that follow them, one batch descends on the sum of

    critics       (q_i(x, a_old) - y)^2 / 2,    y = r + discount (min_i q'_i(x', a') - alpha log pi(a' | x')),
    policy        alpha log pi(a | x) - min_i q_i(x, a),
    temperature   - alpha (log pi(a | x) + H),    H the entropy to be kept,

each with respect to its own parameters alone.  Densities and H are of actions in units of half their range.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffrl.errors import UserError
from diffrl.rl import distributions
from diffrl.rl.agent import Agent, Network, Transition
from diffrl.rl.environment import Actions

Array = jax.Array


class State(NamedTuple):
    """What is learned, the target critics, the optimiser's state and the number of updates.

    params: {"policy": ..., "critics": of both, with a leading axis [2], "log_alpha": scalar}.
    """

    params: dict[str, Any]
    target: Any
    opt_state: Any
    updates: Array


def sac(
    policy: Network,
    critic: Network,
    actions: Actions,
    optimizer: optax.GradientTransformation,
    *,
    tau: Any = 0.005,
    target_entropy: Any = None,
    alpha: Any = 1.0,
) -> Agent:
    """The agent.  Numbers without a bound in their type may be traced (see `driver.many`).

    Args:
        policy: 2 D outputs for actions of D numbers.
        critic: of the observation and the action, brought to [-1, 1], in one vector; one output.
        optimizer: of all parameters; `optax.partition` by `State.params`' names gives each its own, and
            `optax.set_to_zero()` for log_alpha keeps the temperature.
        tau: the share of their distance that the target critics move at each update.
        target_entropy: H, in nats; None = -D.
        alpha: the first temperature.

    Until the first update actions are drawn from all alike.

    Raises:
        UserError: numbered actions.
    """
    if actions.num is not None:
        raise UserError(f"SAC acts by vectors, and these are {actions.num} numbered actions: use DQN")
    family = distributions.squashed(actions)
    least_entropy = -float(actions.shape[0]) if target_entropy is None else target_entropy
    middle, half = (actions.high + actions.low) / 2, (actions.high - actions.low) / 2

    def init(key: Array) -> State:
        first, second = jax.random.split(key)
        critics = jax.vmap(critic.init)(jax.random.split(second))
        start = jnp.log(jnp.asarray(alpha, jnp.float32))
        params = {"policy": policy.init(first), "critics": critics, "log_alpha": start}
        return State(params, critics, optimizer.init(params), jnp.zeros((), jnp.int32))

    def noise(keys: Array) -> tuple[Array, Array]:
        """The policy's, and actions of any kind: both [N, D]."""

        def one(key: Array) -> tuple[Array, Array]:
            first, second = jax.random.split(key)
            anything = jax.random.uniform(second, actions.shape, jnp.float32, actions.low, actions.high)
            return family.noise(first), anything

        return jax.vmap(one)(keys)

    def act(state: State, obs: Any, noise: tuple[Array, Array]) -> tuple[Array, dict[str, Any]]:
        drawn, anything = noise
        raw = family.sample(policy.apply(state.params["policy"], obs), drawn)
        return jnp.where(state.updates > 0, family.action(raw), anything), {}

    def greedy(state: State, obs: Any) -> Array:
        return family.action(family.mode(policy.apply(state.params["policy"], obs)))

    def draw(params: Any, obs: Any, key: Array) -> tuple[Array, Array]:
        """Actions [B, D] and their log-densities [B]."""
        outputs = policy.apply(params, obs)
        raw = family.sample(outputs, jax.vmap(family.noise)(jax.random.split(key, outputs.shape[0])))
        return family.action(raw), distributions.squashed_log_prob(actions, outputs, raw)

    def values(critics: Any, obs: Array, action: Array) -> Array:
        """[2, B]."""
        both = jnp.concatenate([obs, (action - middle) / half], axis=-1)
        return jax.vmap(critic.apply, (0, None))(critics, both)[..., 0]

    def loss(params: dict[str, Any], target: Any, batch: Transition, key: Array) -> tuple[Array, dict[str, Array]]:
        fixed = jax.lax.stop_gradient(params)
        alpha, (now, later) = jnp.exp(fixed["log_alpha"]), jax.random.split(key)
        weight = batch.info["weight"] / batch.info["weight"].max()

        ahead, ahead_log_prob = draw(fixed["policy"], batch.next_obs, later)
        future = values(target, batch.next_obs, ahead).min(axis=0) - alpha * ahead_log_prob
        q = values(params["critics"], batch.obs, batch.action)
        error = batch.reward + batch.info["discount"] * future - q
        critic_loss = 0.5 * jnp.mean(weight * jnp.square(error).sum(axis=0))

        action, log_prob = draw(params["policy"], batch.obs, now)
        policy_loss = jnp.mean(alpha * log_prob - values(fixed["critics"], batch.obs, action).min(axis=0))

        entropy = -jax.lax.stop_gradient(log_prob).mean()
        temperature_loss = jnp.exp(params["log_alpha"]) * (entropy - least_entropy)
        told = {"critic_loss": critic_loss, "policy_loss": policy_loss, "q": q.mean(), "entropy": entropy}
        told |= {"alpha": alpha, "priority": jnp.abs(error).mean(axis=0)}
        return critic_loss + policy_loss + temperature_loss, told

    def update(state: State, batch: Transition, key: Array) -> tuple[State, dict[str, Array]]:
        grads, metrics = jax.grad(loss, has_aux=True)(state.params, state.target, batch, key)
        change, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, change)
        target = optax.incremental_update(params["critics"], state.target, tau)
        return State(params, target, opt_state, state.updates + 1), metrics

    return Agent(init, act, update, greedy, noise)

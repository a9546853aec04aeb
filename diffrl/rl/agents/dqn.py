"""Deep Q-learning (Mnih et al., 2015), with the double estimator (van Hasselt et al., arXiv:1509.06461).

A batch of transitions descends on a robust loss of the errors

    y - q(x, a),    y = r + discount q'(x', argmax_b q(x', b)),

where q' has the target parameters, which follow those of q at a distance.  The original algorithm takes q' for the
argmax as well.  `discount` is gamma, or gamma^m behind returns of m steps, and 0 where the episode terminated; it comes
with the batch, as do the weights of a prioritised buffer, whose priorities are |y - q(x, a)|.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffrl.errors import UserError
from diffrl.rl.agent import Agent, Network, Transition
from diffrl.rl.environment import Actions

Array = jax.Array


class State(NamedTuple):
    """Parameters, target parameters, the optimiser's state and the number of updates."""

    params: Any
    target: Any
    opt_state: Any
    updates: Array


def dqn(
    network: Network,
    actions: Actions,
    optimizer: optax.GradientTransformation,
    *,
    epsilon: Any = 0.05,
    target_every: int = 1,
    tau: Any = 0.005,
    double: bool = True,
    huber: bool = True,
) -> Agent:
    """The agent.  Numbers without a bound in their type may be traced (see `driver.many`).

    Args:
        network: one output for each action; dueling or not is its affair.
        epsilon: probability of an action drawn from all, in [0, 1], or a function of the number of updates.
        target_every, tau: after so many updates the target parameters move by this share of their distance; 10,000 and
            1 in the paper.
        double: see above.
        huber: the loss is linear for errors above 1, else quadratic everywhere.  Robust is also deaf to what is rare
            and large, such as the fall that ends a return of 500: scale such rewards down, or leave it out.

    Raises:
        UserError: actions that are not numbered, target_every below 1.
    """
    num = actions.num
    if num is None:
        raise UserError(f"DQN chooses among numbered actions, and these are vectors {actions.shape}: use SAC")
    if target_every < 1:
        raise UserError(f"target_every={target_every} updates: choose at least 1")

    def init(key: Array) -> State:
        params = network.init(key)
        return State(params, params, optimizer.init(params), jnp.zeros((), jnp.int32))

    def chance(state: State) -> Array:
        return jnp.asarray(epsilon(state.updates) if callable(epsilon) else epsilon, jnp.float32)

    def greedy(state: State, obs: Any) -> Array:
        return jnp.argmax(network.apply(state.params, obs), axis=-1).astype(jnp.int32)

    def noise(keys: Array) -> tuple[Array, Array]:
        """Numbers that decide whether to explore, and actions: both [N]."""

        def one(key: Array) -> tuple[Array, Array]:
            first, second = jax.random.split(key)
            return jax.random.uniform(first), jax.random.randint(second, (), 0, num)

        return jax.vmap(one)(keys)

    def act(state: State, obs: Any, noise: tuple[Array, Array]) -> tuple[Array, dict[str, Any]]:
        number, any_of_all = noise
        return jnp.where(number < chance(state), any_of_all, greedy(state, obs)), {}

    def errors(params: Any, target: Any, batch: Transition) -> tuple[Array, Array]:
        """y - q(x, a) and q(x, a), both [B]."""
        q = _at(network.apply(params, batch.obs), batch.action)
        ahead = network.apply(target, batch.next_obs)
        chooser = network.apply(params, batch.next_obs) if double else ahead
        y = batch.reward + batch.info["discount"] * _at(ahead, jnp.argmax(chooser, axis=-1))
        return y - q, q  # an argmax has no gradient, and target is not differentiated

    def loss(params: Any, target: Any, batch: Transition) -> tuple[Array, tuple[Array, Array]]:
        error, q = errors(params, target, batch)
        weight = batch.info["weight"] / batch.info["weight"].max()
        each = optax.losses.huber_loss(error) if huber else 0.5 * jnp.square(error)
        return jnp.mean(weight * each), (error, q)

    def update(state: State, batch: Transition, key: Array) -> tuple[State, dict[str, Array]]:
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, (error, q)), grads = grad(state.params, state.target, batch)
        change, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params, updates = optax.apply_updates(state.params, change), state.updates + 1
        share = jnp.where(updates % target_every == 0, tau, 0.0)
        target = optax.incremental_update(params, state.target, share)
        size = jnp.abs(error)
        metrics = {"loss": value, "q": q.mean(), "td_error": size.mean(), "epsilon": chance(state), "priority": size}
        return State(params, target, opt_state, updates), metrics

    return Agent(init, act, update, greedy, noise)


def _at(q: Array, action: Array) -> Array:
    """q [B, A] of action [B]."""
    return jnp.take_along_axis(q, action[:, None].astype(jnp.int32), axis=-1)[:, 0]

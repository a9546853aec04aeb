"""Advantage actor-critic (Mnih et al., arXiv:1602.01783), synchronous: all worlds step together.

One step of the optimiser for each rollout, on the mean over its transitions of

    - log pi(a | x) A  -  c_H H(pi)  +  c_V (V(x) - G)^2 / 2

with lambda-returns G and advantages A = G - V(x), neither of which is differentiated (Schulman et al.,
arXiv:1506.02438).  lambda = 1 is the n-step return of the paper: all rewards up to the rollout's end, then the value.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffrl.rl import minibatches as mb
from diffrl.rl import policies, returns
from diffrl.rl.agent import ActorCritic, Agent, Transition
from diffrl.rl.distributions import Distribution

Array = jax.Array


class State(NamedTuple):
    """Parameters and the optimiser's state."""

    params: Any
    opt_state: Any


def loss(
    params: Any,
    rollout: Transition,
    network: ActorCritic,
    distribution: Distribution,
    *,
    discount: Any = 0.99,
    lam: Any = 1.0,
    entropy: Any = 0.01,
    value_weight: Any = 0.5,
    normalise: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """The objective above, a scalar, and metrics, of a rollout [T, N] with info["raw"].

    Args:
        discount, lam: of the returns.
        entropy, value_weight: c_H and c_V.
        normalise: advantages to mean 0 and deviation 1 within the rollout.
    """
    outputs, v_tm1 = policies.over_time(network.both)(params, rollout.obs)
    fixed = jax.lax.stop_gradient
    steps, worlds = rollout.reward.shape
    held, groups = fixed(params), mb.number_of_groups(worlds, steps, minibatches=1)
    v_t = mb.values_after(lambda obs: network.value(held, obs), fixed(v_tm1), rollout, groups)
    discount_t = discount * (1 - rollout.terminated)
    advantage, target = returns.gae(fixed(v_tm1), rollout.reward, discount_t, v_t, rollout.truncated, lam)
    if normalise:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    policy_loss = -jnp.mean(distribution.log_prob(outputs, rollout.info["raw"]) * advantage)
    value_loss = 0.5 * jnp.mean(jnp.square(v_tm1 - target))
    spread = distribution.entropy(outputs).mean()
    total = policy_loss - entropy * spread + value_weight * value_loss
    told = {"loss": total, "policy_loss": policy_loss, "value_loss": value_loss, "entropy": spread}
    return total, told | {"explained_variance": policies.explained_variance(target, v_tm1)}


def a2c(
    network: ActorCritic,
    distribution: Distribution,
    optimizer: optax.GradientTransformation,
    *,
    discount: Any = 0.99,
    lam: Any = 1.0,
    entropy: Any = 0.01,
    value_weight: Any = 0.5,
    normalise: bool = False,
) -> Agent:
    """The agent.  Arguments as of `loss`; the numbers may be traced (see `driver.many`)."""
    weights = {"discount": discount, "lam": lam, "entropy": entropy, "value_weight": value_weight}

    def init(key: Array) -> State:
        params = network.init(key)
        return State(params, optimizer.init(params))

    def objective(params: Any, rollout: Transition) -> tuple[Array, dict[str, Array]]:
        return loss(params, rollout, network, distribution, normalise=normalise, **weights)

    def update(state: State, rollout: Transition, key: Array) -> tuple[State, dict[str, Array]]:
        grads, told = jax.grad(objective, has_aux=True)(state.params, rollout)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, opt_state), told | {"grad_norm": optax.global_norm(grads)}

    act, greedy, noise = policies.acting(network, distribution)
    return Agent(init, act, update, greedy, noise)

"""Proximal policy optimisation (Schulman et al., arXiv:1707.06347), for discrete and continuous actions alike.

With the ratio r = pi(a | x) / pi_old(a | x) and advantages A by GAE, each minibatch of several epochs descends on

    - min(r A, clip(r, 1 - eps, 1 + eps) A)  +  beta KL(pi_old || pi)  -  c_H H(pi)  +  c_V (V(x) - G)^2 / 2.

eps is the clipped surrogate of the paper's section 3, beta its section 4: after an update whose divergence was off the
target by more than a factor of 1.5, beta is doubled or halved.  Either may be left out.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffrl.errors import UserError
from diffrl.rl import minibatches as mb
from diffrl.rl import returns
from diffrl.rl.agent import ActorCritic, Agent, Transition
from diffrl.rl.distributions import Distribution

Array = jax.Array


class State(NamedTuple):
    """Parameters, the optimiser's state and beta, the weight of the divergence."""

    params: Any
    opt_state: Any
    beta: Array


class Samples(NamedTuple):
    """What a minibatch [B] holds; `outputs` and `value` are those of the policy that acted."""

    obs: Any
    raw: Array
    outputs: Array
    advantage: Array
    target: Array
    value: Array


def ppo(
    network: ActorCritic,
    distribution: Distribution,
    optimizer: optax.GradientTransformation,
    *,
    discount: Any = 0.99,
    lam: Any = 0.95,
    clip: Any = 0.2,
    value_clip: Any = None,
    kl_target: Any = None,
    entropy: Any = 0.0,
    value_weight: Any = 0.5,
    normalise: bool = True,
    refresh: bool = False,
    epochs: int = 4,
    minibatches: int = 4,
    groups: int | None = None,
) -> Agent:
    """The agent.  Numbers without a bound in their type may be traced (see `driver.many`).

    Args:
        discount, lam: of the generalised advantages.
        clip: eps; None = no clipping.
        value_clip: how far a value may move from the one that acted before its error stops pulling; None = any.
        kl_target: nats per update; None = no beta.
        entropy, value_weight: c_H and c_V.
        normalise: advantages to mean 0 and deviation 1 within each minibatch.
        refresh: advantages and targets anew before each epoch, by the values as they are by then, and not only once
            by those that acted (Andrychowicz et al., arXiv:2006.05990).
        epochs, minibatches: passes over a rollout, and the parts of each.
        groups: of worlds, for shuffling (see `minibatches`); by default as many as fit.

    Raises:
        UserError: neither `clip` nor `kl_target`; when traced, a rollout that does not divide into the minibatches.
    """
    if clip is None and kl_target is None:
        raise UserError("PPO needs a bound: give clip, kl_target or both")

    def init(key: Array) -> State:
        params = network.init(key)
        return State(params, optimizer.init(params), jnp.asarray(0.0 if kl_target is None else 1.0))

    def act(state: State, obs: Any, keys: Array) -> tuple[Array, dict[str, Array]]:
        outputs = network.policy(state.params, obs)
        raw = jax.vmap(distribution.sample)(outputs, keys)
        return distribution.action(raw), {"raw": raw, "outputs": outputs}

    def greedy(state: State, obs: Any) -> Array:
        return distribution.action(distribution.mode(network.policy(state.params, obs)))

    def surrogate(params: Any, beta: Array, batch: Samples) -> tuple[Array, dict[str, Array]]:
        outputs, value = network.both(params, batch.obs)
        old, new = (distribution.log_prob(x, batch.raw) for x in (batch.outputs, outputs))
        ratio = jnp.exp(new - old)
        advantage = batch.advantage
        if normalise:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        gain, outside = ratio * advantage, jnp.zeros(())
        if clip is not None:
            gain = jnp.minimum(gain, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
            outside = jnp.mean(jnp.abs(ratio - 1) > clip)
        kl = distribution.kl(batch.outputs, outputs).mean()
        spread = distribution.entropy(outputs).mean()
        error = jnp.square(value - batch.target)
        if value_clip is not None:
            near = batch.value + jnp.clip(value - batch.value, -value_clip, value_clip)
            error = jnp.maximum(error, jnp.square(near - batch.target))
        value_loss = 0.5 * error.mean()
        penalty = 0.0 if kl_target is None else beta * kl
        loss = -gain.mean() + penalty - entropy * spread + value_weight * value_loss
        told = {"loss": loss, "policy_loss": -gain.mean(), "value_loss": value_loss, "entropy": spread, "kl": kl}
        return loss, told | {"clip_fraction": outside, "ratio_deviation": jnp.abs(ratio - 1).max()}

    def minibatch(state: State, batch: Samples) -> tuple[State, dict[str, Array]]:
        grads, told = jax.grad(surrogate, has_aux=True)(state.params, state.beta, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, opt_state, state.beta), told | {"grad_norm": optax.global_norm(grads)}

    def update(state: State, rollout: Transition, key: Array) -> tuple[State, dict[str, Array]]:
        steps, worlds = rollout.reward.shape
        parts = mb.number_of_groups(worlds, steps, minibatches, groups)
        samples = advantages(state.params, rollout, parts)

        def epoch(state: State, key: Array) -> tuple[State, dict[str, Array]]:
            now = advantages(state.params, rollout, parts)._replace(value=samples.value)
            state, told = mb.scan_epochs(minibatch, state, now, key, 1, minibatches)
            return state, jax.tree.map(lambda x: x[0], told)

        if refresh:
            state, told = jax.lax.scan(epoch, state, jax.random.split(key, epochs))
        else:
            state, told = mb.scan_epochs(minibatch, state, samples, key, epochs, minibatches)
        metrics = jax.tree.map(jnp.mean, told)
        metrics["explained_variance"] = 1 - jnp.var(samples.target - samples.value) / (jnp.var(samples.target) + 1e-8)
        if kl_target is not None:
            kl = told["kl"][-1].mean()
            factor = jnp.where(kl > 1.5 * kl_target, 2.0, jnp.where(kl < kl_target / 1.5, 0.5, 1.0))
            state = state._replace(beta=jnp.clip(state.beta * factor, 1e-4, 1e4))
            metrics["beta"] = state.beta
        return state, metrics

    def advantages(params: Any, rollout: Transition, parts: int) -> Samples:
        """[G, M] of a rollout [T, N], by the values of `params`."""
        steps = rollout.reward.shape[0]
        obs, raw, outputs = mb.grouped((rollout.obs, rollout.info["raw"], rollout.info["outputs"]), parts)

        v_tm1 = mb.ungrouped(network.value(params, mb.flat(obs)).reshape(parts, -1), steps)
        v_t = mb.values_after(lambda x: network.value(params, x), v_tm1, rollout, parts)
        discount_t = discount * (1 - rollout.terminated)
        advantage, target = returns.gae(v_tm1, rollout.reward, discount_t, v_t, rollout.truncated, lam)
        advantage, target, value = mb.grouped((advantage, target, v_tm1), parts)
        return Samples(obs, raw, outputs, advantage, target, value)

    return Agent(init, act, update, greedy)

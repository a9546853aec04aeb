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


ADVANTAGES = ("rollout", "epoch", "minibatch")
METRICS = ("loss", "policy_loss", "value_loss", "entropy", "kl", "clip_fraction", "ratio_deviation", "grad_norm")


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
    advantages: str = "rollout",
    window: int = 0,
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
        advantages: when they and the targets are formed: once a `rollout`, by the values that acted; before each
            `epoch`, by the values as they are by then (Andrychowicz et al., arXiv:2006.05990); or in each `minibatch`,
            as brax does, which then holds whole windows of steps.  (brax's are a step and then the lambda-return; these
            are GAE in each case.)
        window: steps of such a window, beyond which a value stands for the future; 0: the rollout's.
        epochs, minibatches: passes over a rollout, and the parts of each.
        groups: of worlds, for shuffling (see `minibatches`); by default as many as fit.

    Raises:
        UserError: neither `clip` nor `kl_target`, unknown `advantages`, a window without "minibatch"; when traced, a
            rollout that does not divide into the windows or the minibatches.
    """
    if clip is None and kl_target is None:
        raise UserError("PPO needs a bound: give clip, kl_target or both")
    if advantages not in ADVANTAGES:
        raise UserError(f"advantages={advantages!r}: choose from {', '.join(ADVANTAGES)}")
    if window and advantages != "minibatch":
        raise UserError(f"window={window}: only minibatches are cut into windows; take advantages='minibatch', or 0")

    def init(key: Array) -> State:
        params = network.init(key)
        return State(params, optimizer.init(params), jnp.asarray(0.0 if kl_target is None else 1.0))

    def act(state: State, obs: Any, noise: Array) -> tuple[Array, dict[str, Array]]:
        outputs = network.policy(state.params, obs)
        raw = distribution.sample(outputs, noise)
        return distribution.action(raw), {"raw": raw, "outputs": outputs}

    def greedy(state: State, obs: Any) -> Array:
        return distribution.action(distribution.mode(network.policy(state.params, obs)))

    def surrogate(params: Any, beta: Array, batch: Samples) -> tuple[Array, Array]:
        outputs, value = network.both(params, batch.obs)
        old, new = (distribution.log_prob(x, batch.raw) for x in (batch.outputs, outputs))
        ratio = jnp.exp(new - old)
        advantage = batch.advantage
        if normalise:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        gain, outside = ratio * advantage, jnp.zeros_like(ratio)
        if clip is not None:
            gain = jnp.minimum(gain, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
            outside = (jnp.abs(ratio - 1) > clip).astype(ratio.dtype)
        kl = distribution.kl(batch.outputs, outputs)
        spread = distribution.entropy(outputs)
        error = jnp.square(value - batch.target)
        if value_clip is not None:
            near = batch.value + jnp.clip(value - batch.value, -value_clip, value_clip)
            error = jnp.maximum(error, jnp.square(near - batch.target))
        penalty = 0.0 if kl_target is None else beta * kl
        loss = -gain + penalty - entropy * spread + value_weight * 0.5 * error
        # One mean of all of them, and metrics as one array: on a CPU, each small operation costs as much as a layer.
        means = jnp.stack([loss, -gain, 0.5 * error, spread, kl, outside]).mean(axis=1)
        return loss.mean(), jnp.append(means, jnp.abs(ratio - 1).max())

    def minibatch(state: State, batch: Samples) -> tuple[State, Array]:
        grads, told = jax.grad(surrogate, has_aux=True)(state.params, state.beta, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, opt_state, state.beta), jnp.append(told, optax.global_norm(grads))

    # The three ways give the state, METRICS [epochs, minibatches, 8] and how much of the targets the values explained.

    def each_rollout(state: State, rollout: Transition, key: Array) -> tuple[State, tuple[Array, Array]]:
        steps, worlds = rollout.reward.shape
        parts = mb.number_of_groups(worlds, steps, minibatches, groups)
        samples = formed(state.params, rollout, parts)
        state, told = mb.scan_epochs(minibatch, state, samples, key, epochs, minibatches)
        return state, (told, explained(samples))

    def each_epoch(state: State, rollout: Transition, key: Array) -> tuple[State, tuple[Array, Array]]:
        steps, worlds = rollout.reward.shape
        parts = mb.number_of_groups(worlds, steps, minibatches, groups)

        def epoch(carry: tuple[State, Array], now: tuple[Array, Array]) -> tuple[tuple[State, Array], Any]:
            (state, acted), (key, first) = carry, now
            samples = formed(state.params, rollout, parts)
            acted = jnp.where(first, samples.value, acted)
            state, told = mb.scan_epochs(minibatch, state, samples._replace(value=acted), key, 1, minibatches)
            return (state, acted), (told[0], explained(samples))

        nothing = jnp.zeros_like(mb.grouped(rollout.reward, parts))
        keys = jax.random.split(key, epochs), jnp.arange(epochs) == 0
        (state, _), told = jax.lax.scan(epoch, (state, nothing), keys)
        return state, told

    def each_minibatch(state: State, rollout: Transition, key: Array) -> tuple[State, tuple[Array, Array]]:
        steps, worlds = rollout.reward.shape
        size = window or steps
        if steps % size:
            raise UserError(f"window={size}: rollouts of {steps} steps cannot be cut into such windows")
        parts = mb.number_of_groups(worlds, steps // size, minibatches, groups, "windows")
        acted = rollout.reward  # a stand-in that nothing reads
        if value_clip is not None:
            acted = network.value(state.params, mb.flat(rollout.obs)).reshape(steps, worlds)

        def learn(state: State, windows: tuple[Transition, Array]) -> tuple[State, tuple[Array, Array]]:
            short, acted = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), windows)  # [W, B, ...]
            samples = formed(state.params, short, parts)
            state, told = minibatch(state, mb.flat(samples._replace(value=mb.grouped(acted, parts))))
            return state, (told, explained(samples))

        cut = mb.grouped(mb.windows((rollout, acted), size), parts)
        return mb.scan_epochs(learn, state, cut, key, epochs, minibatches)

    learners = dict(zip(ADVANTAGES, (each_rollout, each_epoch, each_minibatch), strict=True))

    def update(state: State, rollout: Transition, key: Array) -> tuple[State, dict[str, Array]]:
        state, (told, explained) = learners[advantages](state, rollout, key)
        metrics = dict(zip(METRICS, told.mean(axis=(0, 1)), strict=True)) | {"explained_variance": explained.mean()}
        if kl_target is not None:
            kl = told[-1, :, METRICS.index("kl")].mean()
            factor = jnp.where(kl > 1.5 * kl_target, 2.0, jnp.where(kl < kl_target / 1.5, 0.5, 1.0))
            state = state._replace(beta=jnp.clip(state.beta * factor, 1e-4, 1e4))
            metrics["beta"] = state.beta
        return state, metrics

    def explained(samples: Samples) -> Array:
        return 1 - jnp.var(samples.target - samples.value) / (jnp.var(samples.target) + 1e-8)

    def formed(params: Any, rollout: Transition, parts: int) -> Samples:
        """[G, M] of a rollout [T, N], by the values of `params`."""
        steps = rollout.reward.shape[0]
        obs, raw, outputs = mb.grouped((rollout.obs, rollout.info["raw"], rollout.info["outputs"]), parts)

        v_tm1 = mb.ungrouped(network.value(params, mb.flat(obs)).reshape(parts, -1), steps)
        v_t = mb.values_after(lambda x: network.value(params, x), v_tm1, rollout, parts)
        discount_t = discount * (1 - rollout.terminated)
        advantage, target = returns.gae(v_tm1, rollout.reward, discount_t, v_t, rollout.truncated, lam)
        advantage, target, value = mb.grouped((advantage, target, v_tm1), parts)
        return Samples(obs, raw, outputs, advantage, target, value)

    return Agent(init, act, update, greedy, jax.vmap(distribution.noise))

"""Trust region policy optimisation (Schulman et al., arXiv:1502.05477).

    maximise L(theta) = E[pi(a | x) / pi_old(a | x) A(x, a)]   subject to   E KL(pi_old || pi) <= delta.

To first order in L and second in the divergence the solution is a step along s = F^-1 grad L of length
sqrt(2 delta / s'Fs), with F the Fisher matrix.  Conjugate gradients find s from products F v alone; then the step is
shortened until the true L has grown and the true divergence is within delta, or not taken at all.

With J the Jacobian of the network's outputs and H the Hessian of the divergence in them, F = J'HJ exactly, for the
slope of the divergence is 0 at pi_old: a product is one jvp, a product with H and one vjp, and the network is
differentiated once.

Advantages are brought to mean 0 and deviation 1: delta then means the same in all units of reward, and in float32 the
small improvement of L does not drown in a large mean.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffrl.rl import minibatches as mb
from diffrl.rl import policies, returns
from diffrl.rl.agent import Agent, Network, Transition, separate
from diffrl.rl.distributions import Distribution

Array = jax.Array
TINY = 1e-20  # where the gradient is 0, so is the step


class State(NamedTuple):
    """Parameters {"policy", "value"} and the state of the value's optimiser."""

    params: Any
    opt_state: Any


class Search(NamedTuple):
    """The line search: how often the step was shortened, and what was found at its present length."""

    tries: Array
    scale: Array
    kl: Array
    improvement: Array
    good: Array


def trpo(
    policy: Network,
    value: Network,
    distribution: Distribution,
    value_optimizer: optax.GradientTransformation,
    *,
    delta: Any = 0.01,
    damping: Any = 0.1,
    cg_steps: int = 10,
    backtracks: int = 10,
    shrink: Any = 0.8,
    discount: Any = 0.99,
    lam: Any = 0.97,
    value_epochs: int = 5,
    value_minibatches: int = 4,
) -> Agent:
    """The agent.  Numbers without a bound in their type may be traced (see `driver.many`).

    Args:
        value: a network with one output; it regresses on the returns of each rollout by `value_optimizer`.
        delta: nats, the most by which the policy may move in an update, mean over observations.
        damping: added to F's diagonal.
        cg_steps: iterations of conjugate gradients.
        backtracks, shrink: the lengths tried are 1, shrink, shrink^2 ..., this many of them.
        discount, lam: of the generalised advantages.
        value_epochs, value_minibatches: passes over a rollout, and the parts of each.

    Raises:
        UserError: when traced, a rollout that does not divide into the minibatches.
    """
    network = separate(policy, value)

    def init(key: Array) -> State:
        params = network.init(key)
        return State(params, value_optimizer.init(params["value"]))

    def improve(params: Any, rollout: Transition, advantage: Array) -> tuple[Any, dict[str, Array]]:
        """The policy's parameters after the step, if there is one."""

        def outputs_of(params: Any) -> Array:
            return policies.over_time(policy.apply)(params, rollout.obs)

        outputs, jvp = jax.linearize(outputs_of, params)
        old = distribution.log_prob(outputs, rollout.info["raw"])

        def gain(new: Array) -> Array:
            """L(theta) - L(theta_old) of outputs; expm1, since ratios are near 1."""
            return jnp.mean(jnp.expm1(distribution.log_prob(new, rollout.info["raw"]) - old) * advantage)

        def divergence(new: Array) -> Array:
            return distribution.kl(outputs, new).mean()

        vjp = jax.linear_transpose(jvp, params)
        (gradient,) = vjp(jax.grad(gain)(outputs))
        product = fisher(jvp, vjp, jax.grad(divergence), outputs, damping)
        direction = conjugate_gradient(product, gradient, cg_steps)
        length = jnp.sqrt(2 * delta / jnp.maximum(dot(direction, product(direction)), TINY))

        def at(scale: Array) -> Any:
            return jax.tree.map(lambda p, s: p + scale * length * s, params, direction)

        found = search(lambda scale: outputs_of(at(scale)), gain, divergence)
        params = jax.tree.map(lambda old, new: jnp.where(found.good, new, old), params, at(found.scale))
        told = {"kl": found.kl, "step_fraction": found.scale, "improvement": found.improvement}
        told = jax.tree.map(lambda x: jnp.where(found.good, x, 0.0), told)
        norm = optax.global_norm(gradient)
        return params, told | {"entropy": distribution.entropy(outputs).mean(), "grad_norm": norm}

    def search(outputs_at: Callable, gain: Callable, divergence: Callable) -> Search:
        """The longest step that will do."""

        def tried(tries: Array) -> Search:
            scale = jnp.asarray(shrink) ** tries
            new = outputs_at(scale)
            kl, improvement = divergence(new), gain(new)
            return Search(tries, scale, kl, improvement, (improvement > 0) & (kl <= delta))

        def going(search: Search) -> Array:
            return ~search.good & (search.tries < backtracks - 1)

        return jax.lax.while_loop(going, lambda search: tried(search.tries + 1), tried(jnp.zeros((), jnp.int32)))

    def regress(params: Any, opt_state: Any, rollout: Transition, target: Array, key: Array) -> tuple[Any, Any, Array]:
        """(the value's parameters, optimiser's state, mean loss) after all epochs."""

        def loss(params: Any, batch: tuple[Any, Array]) -> Array:
            obs, wanted = batch
            return 0.5 * jnp.mean(jnp.square(value.apply(params, obs)[..., 0] - wanted))

        def step(carry: tuple[Any, Any], batch: tuple[Any, Array]) -> tuple[tuple[Any, Any], Array]:
            params, opt_state = carry
            error, grads = jax.value_and_grad(loss)(params, batch)
            updates, opt_state = value_optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), error

        steps, worlds = rollout.reward.shape
        parts = mb.number_of_groups(worlds, steps, value_minibatches)
        samples = mb.grouped((rollout.obs, target), parts)
        carry = params, opt_state
        carry, errors = mb.scan_epochs(step, carry, samples, key, value_epochs, value_minibatches)
        return *carry, errors.mean()

    def update(state: State, rollout: Transition, key: Array) -> tuple[State, dict[str, Array]]:
        v_tm1 = policies.over_time(network.value)(state.params, rollout.obs)
        steps, worlds = rollout.reward.shape
        groups = mb.number_of_groups(worlds, steps, minibatches=1)
        v_t = mb.values_after(lambda obs: network.value(state.params, obs), v_tm1, rollout, groups)
        discount_t = discount * (1 - rollout.terminated)
        advantage, target = returns.gae(v_tm1, rollout.reward, discount_t, v_t, rollout.truncated, lam)
        normal = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        acts, told = improve(state.params["policy"], rollout, normal)
        values, opt_state, error = regress(state.params["value"], state.opt_state, rollout, target, key)
        told |= {"value_loss": error, "explained_variance": policies.explained_variance(target, v_tm1)}
        return State({"policy": acts, "value": values}, opt_state), told

    act, greedy, noise = policies.acting(network, distribution)
    return Agent(init, act, update, greedy, noise)


def fisher(
    jvp: Callable[[Any], Array],
    vjp: Callable[[Array], tuple[Any]],
    slope: Callable[[Array], Array],
    outputs: Array,
    damping: Any = 0.0,
) -> Callable[[Any], Any]:
    """v -> F v + damping v, trees like the parameters.

    Args:
        jvp, vjp: of parameters -> outputs, at the parameters.
        slope: gradient in the outputs of the mean divergence from the policy with these `outputs`.
    """

    def product(v: Any) -> Any:
        (pulled,) = vjp(jax.jvp(slope, (outputs,), (jvp(v),))[1])
        return jax.tree.map(lambda f, v: f + damping * v, pulled, v)

    return product


def conjugate_gradient(product: Callable[[Any], Any], b: Any, steps: int) -> Any:
    """x with `product`(x) near b, after `steps` iterations from 0 (Hestenes & Stiefel, 1952); trees.

    A fixed number: seeds side by side would wait for the slowest anyway.  jax's own `cg` begins with the product of a
    constant 0, and XLA's CPU compiler (jaxlib 0.10.2) makes garbage of that for many seeds of a large rollout.
    """

    def add(a: Any, scale: Array, b: Any) -> Any:
        return jax.tree.map(lambda a, b: a + scale * b, a, b)

    def body(_: Array, carry: tuple[Any, Any, Any, Array]) -> tuple[Any, Any, Any, Array]:
        x, residual, direction, square = carry
        pushed = product(direction)
        length = square / jnp.maximum(dot(direction, pushed), TINY)
        x, residual = add(x, length, direction), add(residual, -length, pushed)
        new = dot(residual, residual)
        return x, residual, add(residual, new / jnp.maximum(square, TINY), direction), new

    start = jax.tree.map(jnp.zeros_like, b), b, b, dot(b, b)
    return jax.lax.fori_loop(0, steps, body, start)[0]


def dot(a: Any, b: Any) -> Array:
    """The inner product of two trees."""
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)), jnp.zeros(()))

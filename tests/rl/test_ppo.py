"""PPO: what its first minibatch must be, its gradient on a bandit, its critic's fixed points, its bounds.

Also brax's own loss on the same windows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agent_cases import rollout, table
from rl_worlds import bias, counting, linear_critic, many, noisy
from scipy.special import softmax
from scipy.stats import entropy

from diffrl.errors import UserError
from diffrl.recipes import policies
from diffrl.recipes.policies import NetConfig
from diffrl.rl import distributions, driver
from diffrl.rl.agent import Transition, separate
from diffrl.rl.agents.ppo import ppo
from diffrl.rl.environment import Actions
from diffrl.rl.on_policy import on_policy

BOX = Actions(shape=(2,), low=-2.0, high=2.0)
T, F = True, False


@pytest.mark.parametrize("actions", [Actions(num=3), BOX], ids=["discrete", "continuous"])
def test_first_minibatch_is_on_policy(actions):
    """With a step of size zero every minibatch is the first: ratio 1, no divergence, nothing clipped."""
    dist = distributions.of(actions, squash=True)
    agent = ppo(linear_critic(dist.size, 2), dist, optax.sgd(0.0), epochs=2, minibatches=4)
    run = on_policy(many(noisy(actions), 8), agent, 16)
    _, told = jax.jit(run.step)(run.init(jax.random.key(0)))
    assert told["ratio_deviation"] < 1e-5
    assert abs(told["kl"]) < 1e-6
    assert told["clip_fraction"] == 0
    assert told["grad_norm"] > 1e-3  # and yet there is something to learn


def bandit(rewards, outputs, samples, seed=0):
    """A rollout [1, samples] of one-step episodes in a bandit, by a softmax policy."""
    action = jax.random.categorical(jax.random.key(seed), outputs, shape=(1, samples))
    shape = (1, samples)
    return Transition(
        jnp.zeros((*shape, 1)),
        action,
        rewards[action],
        jnp.ones(shape, bool),
        jnp.zeros(shape, bool),
        jnp.zeros((*shape, 1)),
        {"raw": action, "outputs": jnp.broadcast_to(outputs, (*shape, len(outputs)))},
    )


def test_gradient_on_a_bandit():
    """One full-batch step of SGD is the policy gradient sum_a grad pi(a) r(a), which is known."""
    logits, rewards = jnp.array([0.3, -0.5, 1.0]), jnp.array([1.0, 3.0, -2.0])
    agent = ppo(
        separate(bias(3), bias(1)),
        distributions.categorical(3),
        optax.sgd(1.0),
        epochs=1,
        minibatches=1,
        normalise=False,
    )
    state = agent.init(jax.random.key(0))
    state = state._replace(params={"policy": logits, "value": jnp.zeros(1)})
    new, _ = jax.jit(agent.update)(state, bandit(rewards, logits, 200_000), jax.random.key(1))
    exact = jax.grad(lambda x: jax.nn.softmax(x) @ rewards)(logits)
    np.testing.assert_allclose(new.params["policy"] - logits, exact, atol=0.02)
    np.testing.assert_allclose(new.params["value"], 0.5 * jax.nn.softmax(logits) @ rewards, atol=0.02)


@pytest.mark.parametrize(("world", "value"), [({"limit": 8}, 50.0), ({"end": 8}, None)], ids=["limit", "terminal"])
def test_truncation_is_not_termination(world, value):
    """Reward 1 for ever at discount 0.98 is worth 50, however often the episode is cut; with an end it is not."""
    optimizer = optax.sgd(0.3)
    agent = ppo(separate(bias(2), bias(1)), distributions.categorical(2), optimizer, discount=0.98, epochs=4)
    run = on_policy(many(counting(**world), 4), agent, 16)
    state, _ = jax.jit(lambda run_: driver.repeat(run.step, 150)(run_, None))(run.init(jax.random.key(0)))
    found = float(state.agent.params["value"][0])
    if value is not None:
        assert found == pytest.approx(value, abs=1.0)
    else:  # between 1, the last step's, and the first one's (1 - 0.98^8) / 0.02
        assert 1.0 < found < 7.5


@pytest.mark.parametrize("advantages", ["rollout", "epoch", "minibatch"])
def test_targets_of_values_by_hand(advantages):
    """Rewards 2 and 5, discount 1/2, lambda 1.  The last return is 5 + 4/2 = 7, of a rollout that is cut.

    The first one is 2 + 7/2, 2 alone at an end, and 2 + 8/2 where the episode is cut in a state worth 8.
    """
    values = np.array([1.0, 2.0, 8.0, 4.0])
    agent = ppo(
        separate(table(4, 2), table(4, 1)), distributions.categorical(2), optax.sgd(1.0), value_weight=1.0,
        discount=0.5, lam=1.0, advantages=advantages, epochs=1, minibatches=1,
    )  # fmt: skip
    start = agent.init(jax.random.key(0))
    start = start._replace(params={**start.params, "value": jnp.asarray(values, jnp.float32)[:, None]})

    def moved(terminated, truncated, after):
        ends = (jnp.array([[end], [False]]) for end in (terminated, truncated))
        steps = rollout([[0], [1]], [[0], [1]], [[2.0], [5.0]])
        info = {**steps.info, "outputs": jnp.zeros((2, 1, 2))}
        steps = Transition(steps.obs, steps.action, steps.reward, *ends, jnp.array([[after], [3]]), info)
        return agent.update(start, steps, jax.random.key(0))[0].params["value"][:, 0] - start.params["value"][:, 0]

    found = jax.jit(jax.vmap(moved))(jnp.array([F, T, F]), jnp.array([F, F, T]), jnp.array([1, 1, 2]))
    want = [[(first - 1) / 2, (7 - 2) / 2, 0, 0] for first in (2 + 7 / 2, 2, 2 + 8 / 2)]
    np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.parametrize("advantages", ["rollout", "epoch", "minibatch"])
def test_refreshed_targets_follow_the_values(advantages):
    """Two epochs of one-step targets 1 + 0.9 v by hand: the second one's from the old v, or from what it has become."""
    agent = ppo(
        separate(bias(2), bias(1)), distributions.categorical(2), optax.sgd(0.2), value_weight=1.0,
        discount=0.9, lam=0.0, advantages=advantages, epochs=2, minibatches=1,
    )  # fmt: skip
    run = on_policy(many(counting(), 4), agent, 8)
    start = run.init(jax.random.key(0))
    params = {**start.agent.params, "value": jnp.array([2.0])}
    new, _ = jax.jit(run.step)(start._replace(agent=start.agent._replace(params=params)))
    first = 2.0 + 0.2 * (1 + 0.9 * 2.0 - 2.0)
    seen = 2.0 if advantages == "rollout" else first
    assert float(new.agent.params["value"][0]) == pytest.approx(first + 0.2 * (1 + 0.9 * seen - first), rel=1e-5)


def rollout_with_ends(steps=12, worlds=4):
    """Random rewards and observations; some steps end their episode, one way or the other."""
    keys = iter(jax.random.split(jax.random.key(3), 6))
    obs = jax.random.normal(next(keys), (steps + 1, worlds, 3))
    terminated = jax.random.bernoulli(next(keys), 0.15, (steps, worlds))
    truncated = jax.random.bernoulli(next(keys), 0.2, (steps, worlds)) & ~terminated
    raw = jax.random.normal(next(keys), (steps, worlds, 2))
    info = {"raw": raw, "outputs": jnp.zeros((steps, worlds, 4))}
    reward = jax.random.normal(next(keys), (steps, worlds))
    return Transition(obs[:-1], raw, reward, terminated, truncated, obs[1:] + 0.1, info)


@pytest.mark.parametrize("window", [0, 4])
def test_advantages_of_minibatches_are_those_of_windows(window):
    """One minibatch, one epoch: the same update as if each window had been a rollout of worlds of its own."""
    settings = {"value_clip": 0.1, "epochs": 1, "minibatches": 1, "normalise": False}
    network, gaussian = linear_critic(4, 3), distributions.normal(BOX)
    rollout = rollout_with_ends()
    agent = ppo(network, gaussian, optax.sgd(0.1), advantages="minibatch", window=window, **settings)
    once = ppo(network, gaussian, optax.sgd(0.1), **settings)
    cut = jax.tree.map(lambda x: jnp.concatenate(jnp.split(x, 12 // (window or 12)), axis=1), rollout)
    state = agent.init(jax.random.key(0))
    found, told = jax.jit(agent.update)(state, rollout, jax.random.key(1))
    wanted, said = jax.jit(once.update)(state, cut, jax.random.key(1))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found.params, wanted.params)
    assert float(told["explained_variance"]) == pytest.approx(float(said["explained_variance"]), rel=1e-4)


def test_windows_that_do_not_fit_are_named():
    settings = {"network": linear_critic(4, 3), "distribution": distributions.normal(BOX)}
    optimizer = optax.sgd(0.1)
    with pytest.raises(UserError, match=r"advantages=.never.*minibatch"):
        ppo(**settings, optimizer=optimizer, advantages="never")
    with pytest.raises(UserError, match=r"window=4.*advantages=.minibatch"):
        ppo(**settings, optimizer=optimizer, window=4)
    for window, minibatches, words in ((5, 1, "window=5: rollouts of 12 steps"), (6, 16, "2 windows of 4 worlds")):
        agent = ppo(**settings, optimizer=optimizer, advantages="minibatch", window=window, minibatches=minibatches)
        with pytest.raises(UserError, match=words):
            jax.eval_shape(agent.update, agent.init(jax.random.key(0)), rollout_with_ends(), jax.random.key(0))


def test_clipping_bounds_the_ratio():
    """Many epochs on one bandit rollout: the clipped policy stops near the bound, the free one runs away."""
    logits, rewards = jnp.zeros(2), jnp.array([1.0, 0.0])
    rollout = bandit(rewards, logits, 256)

    def moved(**bounds):
        agent = ppo(separate(bias(2), bias(1)), distributions.categorical(2), optax.sgd(0.02), epochs=100, **bounds)
        state, told = jax.jit(agent.update)(agent.init(jax.random.key(0)), rollout, jax.random.key(1))
        return float(jax.nn.softmax(state.params["policy"])[0]) / 0.5, told

    near, told = moved(clip=0.2)
    free, _ = moved(clip=1e9)
    assert 1.1 < near < 1.35
    assert free > 1.7
    assert told["clip_fraction"] > 0.2


def test_divergence_is_held_by_its_penalty():
    """A bandit whose better arm changes at every update, learned fast: beta grows until updates keep to the target."""
    agent = ppo(
        separate(bias(2), bias(1)), distributions.categorical(2), optax.sgd(0.3), clip=None, kl_target=0.01, epochs=20
    )

    @jax.jit
    def update(state, i):
        rewards = jnp.array([1.0, 0.0]) * jnp.where(i % 2, 1, -1)
        rollout = bandit(rewards, state.params["policy"], 256, i)
        return agent.update(state, rollout, jax.random.key(0))

    _, told = jax.lax.scan(update, agent.init(jax.random.key(0)), jnp.arange(40))
    assert told["kl"][0] > 0.1
    assert 0.005 < float(jnp.mean(told["kl"][-10:])) < 0.02
    assert told["beta"][-1] >= 4


def test_value_clipping_limits_the_value():
    """With targets far away, a clipped value stops where its error no longer pulls."""
    rollout = bandit(jnp.array([100.0, 100.0]), jnp.zeros(2), 64)

    def value(value_clip):
        agent = ppo(
            separate(bias(2), bias(1)), distributions.categorical(2), optax.sgd(0.05), epochs=40, value_clip=value_clip
        )
        return float(
            jax.jit(agent.update)(agent.init(jax.random.key(0)), rollout, jax.random.key(1))[0].params["value"][0]
        )

    assert 0.5 < value(0.5) < 6  # past the bound by one step at most
    assert value(None) > 90


@pytest.mark.parametrize("advantages", ["rollout", "epoch", "minibatch"])
def test_value_clipping_waives_no_error(advantages):
    """Three epochs from 0 towards 1 with a clip of 0.2, by hand at three rates.

    0.05: never beyond it, v + rate (1 - v) three times.  0.6: a value that has come nearer, to 0.6, is left there.
    3: one thrown to 3, farther off than 0.2 is, is still pulled: 3, -3, 9.
    """

    def third(rate):
        agent = ppo(
            separate(bias(2), bias(1)), distributions.categorical(2), optax.sgd(rate), value_weight=1.0,
            value_clip=0.2, normalise=False, advantages=advantages, epochs=3, minibatches=1,
        )  # fmt: skip
        rollout = bandit(jnp.ones(2), jnp.zeros(2), 8)
        return agent.update(agent.init(jax.random.key(0)), rollout, jax.random.key(1))[0].params["value"][0]

    found = jax.jit(jax.vmap(third))(jnp.array([0.05, 0.6, 3.0]))
    np.testing.assert_allclose(found, [0.142625, 0.6, 9.0], rtol=1e-5)


def test_the_penalty_is_the_divergence_from_the_policy_that_acted():
    """Without advantages a step of SGD is down KL(p || q) alone, in q's logits q - p."""
    before, now = np.array([2.0, 0.0, -1.0]), np.array([-0.5, 0.3, 1.0])
    p, q = softmax(before), softmax(now)
    agent = ppo(
        separate(bias(3), bias(1)), distributions.categorical(3), optax.sgd(1.0), clip=None, kl_target=0.01,
        normalise=False, epochs=1, minibatches=1,
    )  # fmt: skip
    state = agent.init(jax.random.key(0))
    state = state._replace(params={"policy": jnp.asarray(now, jnp.float32), "value": jnp.zeros(1)})
    rollout = bandit(jnp.zeros(3), jnp.asarray(before, jnp.float32), 8)
    new, told = jax.jit(agent.update)(state, rollout, jax.random.key(1))
    np.testing.assert_allclose(new.params["policy"] - now, p - q, atol=1e-5)
    assert float(told["kl"]) == pytest.approx(entropy(p, q), rel=1e-4)
    assert abs(entropy(p, q) - entropy(q, p)) > 0.1


def test_mistakes_are_one_line():
    dist = distributions.categorical(3)
    with pytest.raises(UserError, match="clip, kl_target or both"):
        ppo(linear_critic(3, 2), dist, optax.sgd(0.1), clip=None)
    agent = ppo(linear_critic(3, 2), dist, optax.sgd(0.1), minibatches=7)
    run = on_policy(many(noisy(), 8), agent, 16)
    with pytest.raises(UserError, match=r"128 samples .* 7 minibatches"):
        jax.eval_shape(run.step, jax.eval_shape(run.init, jax.random.key(0)))


@pytest.mark.oracle
@pytest.mark.parametrize("entropy", [0.0, 0.3])
def test_gradient_is_braxs(entropy):
    """Of windows, with probability ratios beyond the clipping and episodes that end; lambda = 1.

    brax's advantages are one step and then the lambda-return, ours the return itself; for lambda = 1 both are the same.
    Its entropy is of one sample, and so its gradient a mean over many keys.
    """
    losses = pytest.importorskip(
        "brax.training.agents.ppo.losses", reason="brax of the [oracles] extra is not installed"
    )
    from brax.training import types
    from brax.training.agents.ppo import networks

    steps, worlds, window, discount = 8, 12, 4, 0.9
    env = many(noisy(BOX), worlds)
    config = NetConfig((8, 8), (16,), "silu", orthogonal=False, squash=True, free_std=False)
    network, family = policies.actor_critic(config, env), policies.distribution(config, env)
    agent = ppo(
        network, family, optax.sgd(1.0), discount=discount, lam=1.0, entropy=entropy, advantages="minibatch",
        window=window, epochs=1, minibatches=1,
    )  # fmt: skip
    acted, state = agent.init(jax.random.key(0)), agent.init(jax.random.key(1))
    acted, state = (s._replace(params=jax.tree.map(lambda x: 2 * x + 0.1, s.params)) for s in (acted, state))
    keys = driver.split_over(jax.random.key(3), worlds)
    act = functools.partial(agent.act, acted)
    _, rollout = driver.collect(env, act, steps, env.reset(jax.random.key(2)), keys, agent.noise)
    rollout = rollout._replace(
        reward=jax.random.normal(jax.random.key(4), (steps, worlds)),
        terminated=jax.random.bernoulli(jax.random.key(5), 0.2, (steps, worlds)),
        truncated=jnp.zeros((steps, worlds), bool),
    )
    new, told = agent.update(state, rollout, jax.random.key(6))
    assert 0.1 < told["clip_fraction"] < 0.9
    ours = jax.tree.map(jnp.subtract, state.params, new.params)

    def cut(x):
        """[steps, worlds, ...] -> [windows, window, ...]."""
        return jnp.moveaxis(x.reshape(-1, window, *x.shape[1:]), 2, 1).reshape(-1, window, *x.shape[2:])

    def converted(params):
        def one(layers):
            names = {"out": f"hidden_{len(layers) - 1}"}
            return {"params": {names.get(name, name): layer for name, layer in layers.items()}}

        return losses.PPONetworkParams(*(one(params[name]["params"]) for name in ("policy", "value")))

    theirs = networks.make_ppo_networks(
        env.obs.shape[-1], 2, policy_hidden_layer_sizes=(8, 8), value_hidden_layer_sizes=(16,)
    )
    raw, outputs = rollout.info["raw"], rollout.info["outputs"]
    data = types.Transition(
        *map(cut, (rollout.obs, rollout.action, rollout.reward, 1.0 - rollout.terminated, rollout.next_obs)),
        extras={
            "state_extras": {"truncation": cut(jnp.zeros((steps, worlds)))},
            "policy_extras": {
                "raw_action": cut(raw),
                "log_prob": cut(theirs.parametric_action_distribution.log_prob(outputs, raw)),
                "distribution_params": cut(outputs),
            },
        },
    )

    def loss(params, key):
        return losses.compute_ppo_loss(
            params, None, data, key, theirs, entropy, discount, gae_lambda=1.0, clipping_epsilon=0.2
        )[0]

    keys = jax.random.split(jax.random.key(7), 4000 if entropy else 1)
    want = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(converted(state.params), keys)
    error = 4 / np.sqrt(len(keys)) if entropy else 0.0

    def compare(have, want):
        # Deviations are large here, where the quadrature of the entropy is a little off.
        rtol, atol = 0.02 if entropy else 1e-3, 1e-5 + error * want.std(0).max()
        np.testing.assert_allclose(have, want.mean(0), rtol=rtol, atol=atol)

    jax.tree.map(compare, converted(ours), want)

"""Classic control against Gymnasium: the same start, the same actions, the same episode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.rl import classic_control

WORLDS = {
    "CartPole-v1": classic_control.cartpole,
    "Acrobot-v1": classic_control.acrobot,
    "Pendulum-v1": classic_control.pendulum,
    "MountainCar-v0": classic_control.mountain_car,
}


def play(env, policy, num, start=None):
    """The first state (its physical state replaced by `start`), and `num` that follow by policy(t, obs), stacked."""

    @jax.jit
    def run(key, start):
        first = env.reset(key)
        if start is not None:
            first = first._replace(inner=first.inner._replace(state=first.inner.state._replace(inner=start)))

        def body(state, t):
            new = env.step(state, policy(t, state.obs))
            return new, new

        return first, jax.lax.scan(body, first, jnp.arange(num))[1]

    return run(jax.random.key(0), start)


def in_gymnasium(name, policy, num, start):
    """Arrays [T, ...] of one episode there: physical states, actions, obs, rewards, terminated, truncated."""
    env = pytest.importorskip("gymnasium").make(name)
    env.reset(seed=0)
    env.unwrapped.state = np.asarray(start, np.float64)
    seen = []
    for t in range(num):
        before = np.array(env.unwrapped.state)
        action = policy(t, before)
        seen.append((before, action, *env.step(action)[:4]))
        if seen[-1][4] or seen[-1][5]:
            break
    return [np.array(column) for column in zip(*seen, strict=True)]


def random_actions(name, num, seed=0):
    actions, rng = WORLDS[name]().actions, np.random.default_rng(seed)
    if actions.num is None:  # a quarter of them beyond what is clipped
        return rng.uniform(-2.7, 2.7, (num, *actions.shape)).astype(np.float32)
    return rng.integers(0, actions.num, num)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "start", "length", "atol"),
    [
        ("CartPole-v1", [0.01, 0.02, -0.03, 0.04], None, 1e-5),
        ("CartPole-v1", [-0.04, 0.0, 0.02, -0.05], None, 1e-5),
        ("Acrobot-v1", [0.1, -0.05, 0.02, 0.08], 200, 1e-3),
        ("Pendulum-v1", [2.5, 0.7], 200, 1e-3),
        ("MountainCar-v0", [-0.52, 0.0], 200, 1e-5),
    ],
)
def test_random_actions_give_the_episode_that_they_give_in_gymnasium(name, start, length, atol):
    actions = random_actions(name, 200)
    _, _, obs, reward, terminated, truncated = in_gymnasium(name, lambda t, _: actions[t], 200, start)
    _, states = play(WORLDS[name](), lambda t, _: jnp.asarray(actions)[t], 200, jnp.asarray(start, jnp.float32))
    n = len(reward)
    assert (n == length) if length else terminated[-1]  # random pushes drop the pole
    np.testing.assert_allclose(states.obs[:n], obs, atol=atol)
    np.testing.assert_allclose(states.reward[:n], reward, atol=atol)
    np.testing.assert_array_equal(states.terminated[:n], terminated)
    np.testing.assert_array_equal(states.truncated[:n], truncated)


def balance(x):
    return x[2] + 0.5 * x[3] + 0.02 * x[0] + 0.1 * x[1] > 0


GOOD = {  # a policy of the physical state, a start, whether it ends before the limit
    "CartPole-v1": (lambda t, x: int(balance(x)), [0.01, 0.02, -0.03, 0.04], False),
    "Acrobot-v1": (lambda t, x: int(np.sign(x[3]) + 1), [0.5, 0.0, 0.5, 0.0], True),
    "Pendulum-v1": (lambda t, x: np.array([2 * np.sign(x[1])], np.float32), [3.0, 0.1], False),
    "MountainCar-v0": (lambda t, x: int(np.sign(x[1]) + 1), [-0.5, 0.001], True),
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", WORLDS)
def test_every_step_of_a_good_episode_is_gymnasiums(name):
    """Each from the state that Gymnasium was in, so that float32's errors do not grow over an unstable motion."""
    policy, start, ends = GOOD[name]
    before, actions, obs, reward, terminated, truncated = in_gymnasium(name, policy, 500, start)
    assert (bool(terminated[-1]), bool(truncated[-1])) == (ends, not ends)
    steps_agree(name, before, actions, obs, reward, terminated)


def steps_agree(name, before, actions, obs, reward, terminated):
    env = WORLDS[name]()
    first = jax.eval_shape(env.reset, jax.random.key(0))

    def one(x, action):
        state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
        state = state._replace(inner=state.inner._replace(state=state.inner.state._replace(inner=x)))
        return env.step(state, action)

    states = jax.jit(jax.vmap(one))(jnp.asarray(before, jnp.float32), jnp.asarray(actions))
    np.testing.assert_allclose(states.obs, obs, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(states.reward, reward, rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(states.terminated, terminated)


EDGES = [
    ("CartPole-v1", [2.39, 1.0, 0.0, 0.0]),
    ("CartPole-v1", [-2.39, -1.0, 0.0, 0.0]),
    ("CartPole-v1", [0.0, 0.0, -0.2094, -0.01]),  # 12 degrees are 0.20944
    ("CartPole-v1", [0.0, 0.0, 0.2094, 0.001]),
    ("Acrobot-v1", [3.0, 3.0, 12.0, 25.0]),  # angles beyond pi, speeds beyond their limits
    ("Acrobot-v1", [-3.0, -3.0, -12.0, -28.0]),
    ("Pendulum-v1", [3.1, 7.9]),
    ("Pendulum-v1", [-3.1, -7.9]),
    ("MountainCar-v0", [-1.19, -0.06]),  # into the wall on the left
    ("MountainCar-v0", [0.499, 0.02]),
]


@pytest.mark.oracle
@pytest.mark.parametrize(("name", "start"), EDGES)
def test_limits_are_gymnasiums(name, start):
    for action in (0, WORLDS[name]().actions.num - 1) if name != "Pendulum-v1" else ([-5.0], [5.0]):
        action = action if isinstance(action, int) else np.array(action, np.float32)
        before, actions, obs, reward, terminated, _ = in_gymnasium(name, lambda t, _, a=action: a, 1, start)
        steps_agree(name, before, actions, obs, reward, terminated)


def test_a_balanced_pole_is_cut_after_500_steps():
    _, states = play(classic_control.cartpole(), lambda t, obs: balance(obs).astype(jnp.int32), 500)
    assert not states.terminated.any()
    np.testing.assert_array_equal(np.flatnonzero(states.truncated), [499])


@pytest.mark.oracle
@pytest.mark.parametrize("name", WORLDS)
def test_starts_are_spread_as_gymnasiums(name):
    gymnasium = pytest.importorskip("gymnasium")
    theirs = gymnasium.make(name)
    drawn = np.array([theirs.reset(seed=seed)[0] for seed in range(400)])
    ours = np.asarray(jax.vmap(WORLDS[name]().reset)(jax.random.split(jax.random.key(0), 4000)).obs)
    span = np.maximum(np.ptp(drawn, 0), 1e-6)
    np.testing.assert_allclose((ours.mean(0) - drawn.mean(0)) / span, 0, atol=0.1)
    np.testing.assert_allclose((np.ptp(ours, 0) - np.ptp(drawn, 0)) / span, 0, atol=0.05)


@pytest.mark.parametrize("name", WORLDS)
def test_idleness_is_cut_at_the_limit_and_can_be_seen(name):
    env = WORLDS[name]()
    idle = jnp.zeros(env.actions.shape) if env.actions.num is None else jnp.int32(env.actions.num // 2)
    limit = 500 if name == "Acrobot-v1" else 200
    first, states = play(env, lambda t, _: idle, limit)
    assert first.obs.shape == env.obs.shape
    assert first.obs.dtype == states.obs.dtype == env.obs.dtype == jnp.float32
    if name != "CartPole-v1":  # whose pole falls
        np.testing.assert_array_equal(np.flatnonzero(states.truncated), [limit - 1])
    frames = [env.render(first), env.render(jax.tree.map(lambda x: x[25], states))]
    assert all(frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3 for frame in frames)
    assert np.abs(frames[0].astype(int) - frames[1]).max() > 50  # something moved

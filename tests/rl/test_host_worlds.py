"""Worlds on the host against the libraries that they come from, step for step, out of compiled loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.rl import classic_control, driver
from diffrl.rl.adapters import host


def seed_of(key, num):
    """What a reset's key gives the first of `num` worlds."""
    return int(jax.random.bits(key)) % (2**31 - num)


def collected(env, policy, steps, key=0):
    """A compiled rollout [steps, n] of policy(obs, t), and the first observations."""

    @jax.jit
    def run(key):
        world = env.reset(key)
        keys = jax.random.split(key, world.reward.shape[0])
        act = lambda obs, now: (policy(obs, now), {})  # noqa: E731
        return world.obs, driver.collect(env, act, steps, world, keys)[1]

    return run(jax.random.key(key))


@pytest.mark.oracle
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_gymnasiums_worlds_are_what_its_own_vector_makes_of_them(name, threads):
    gymnasium = pytest.importorskip("gymnasium")
    env = host.gymnasium_vector(name, 3, threads)
    discrete = env.actions.num is not None

    def policy(obs, keys):  # actions of Pendulum reach beyond what it takes
        random = jax.vmap(jax.random.uniform)(keys)
        return (random > 0.5).astype(jnp.int32) if discrete else 6 * random[:, None] - 3

    first, rollout = collected(env, policy, 210)
    theirs = gymnasium.make_vec(
        name, 3, vectorization_mode="sync", vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    )
    obs, _ = theirs.reset(seed=seed_of(jax.random.key(0), 3))
    np.testing.assert_array_equal(first, obs)
    totals, lengths, ended = np.zeros(3), np.zeros(3, int), 0
    for t in range(210):
        np.testing.assert_array_equal(rollout.obs[t], obs)
        obs, reward, terminated, truncated, info = theirs.step(np.array(rollout.action[t]).clip(-2, 2))
        final = obs.copy()
        for i in np.flatnonzero(terminated | truncated):
            final[i] = info["final_obs"][i]
            ended += 1
        totals, lengths = totals + reward, lengths + 1
        np.testing.assert_allclose(rollout.next_obs[t], final, rtol=1e-6)
        np.testing.assert_allclose(rollout.reward[t], reward, rtol=1e-6)
        np.testing.assert_array_equal(rollout.terminated[t], terminated)
        np.testing.assert_array_equal(rollout.truncated[t], truncated)
        np.testing.assert_allclose(rollout.world["episode_return"][t], totals, rtol=1e-5)
        np.testing.assert_array_equal(rollout.world["episode_length"][t], lengths)
        totals[terminated | truncated], lengths[terminated | truncated] = 0, 0
    assert ended >= 3


def test_pure_worlds_on_the_host_make_a_vector_too():
    """Against what they are in jax."""
    pure = classic_control.mountain_car()
    env = host.vector(lambda: host.from_environment(pure), 2)
    _, rollout = collected(env, lambda obs, keys: jnp.full(2, 2), 205)
    seed = seed_of(jax.random.key(0), 2)
    for i in range(2):
        state = jax.jit(pure.reset)(jax.random.fold_in(jax.random.key(seed + i), 0))
        np.testing.assert_array_equal(rollout.obs[0, i], state.obs)
        end = jax.jit(lambda state: jax.lax.fori_loop(0, 200, lambda _, now: pure.step(now, 2), state))(state)
        np.testing.assert_allclose(rollout.next_obs[199, i], end.obs, atol=1e-6)
        np.testing.assert_array_equal(np.flatnonzero(rollout.truncated[:, i]), [199])
        assert np.abs(rollout.obs[200, i] - rollout.obs[0, i]).max() > 0
        np.testing.assert_array_equal(rollout.world["episode_return"][198:202, i], [-199, -200, -1, -2])


@pytest.mark.oracle
def test_a_world_of_gymnasium_is_gymnasiums():
    gymnasium = pytest.importorskip("gymnasium")
    world, theirs = host.gymnasium_world("CartPole-v1"), gymnasium.make("CartPole-v1")
    for seed in (5, None, None):
        np.testing.assert_array_equal(world.reset(seed), theirs.reset(seed=seed)[0])
        ended = False
        while not ended:
            obs, reward, terminated, truncated = world.step(1)
            wanted = theirs.step(1)
            np.testing.assert_array_equal(obs, wanted[0])
            assert (reward, terminated, truncated) == wanted[1:4]
            ended = terminated or truncated


@pytest.mark.oracle
@pytest.mark.parametrize(("name", "wanted"), [("CliffWalking-v1", 30), ("MountainCar-v0", 200)])
def test_episodes_without_a_limit_get_one(name, wanted):
    """Up against the wall, for ever; the mountain car knows a limit of its own."""
    pytest.importorskip("gymnasium")
    world = host.gymnasium_world(name, limit=30)
    world.reset(0)
    ends = [world.step(0)[2:] for _ in range(wanted)]
    assert ends == [(False, False)] * (wanted - 1) + [(False, True)]


@pytest.mark.oracle
def test_boxes_are_clipped_and_numbers_start_where_they_start():
    """A world that shows what it was given."""
    gymnasium = pytest.importorskip("gymnasium")

    class Mirror(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-9, 9, (1,), np.float64)

        def __init__(self, space):
            self.action_space = space

        def reset(self, seed=None, options=None):
            return np.zeros(1), {}

        def step(self, action):
            return np.full(1, action, float), 1.0, True, True, {}

    world = host.gymnasium_world(lambda: Mirror(gymnasium.spaces.Box(-0.5, 2.0, (1,))))
    assert (world.actions.low, world.actions.high) == (-0.5, 2.0)
    assert world.reset(0).dtype == np.float32
    np.testing.assert_array_equal([world.step([a])[0][0] for a in (-3, 1, 3)], [-0.5, 1, 2])
    assert world.step([0])[1:] == (1.0, True, False)  # never both ends
    world = host.gymnasium_world(lambda: Mirror(gymnasium.spaces.Discrete(3, start=4)))
    assert world.step(2)[0][0] == 6
    with pytest.raises(UserError, match="rescale them to one finite interval first"):
        host.gymnasium_world(lambda: Mirror(gymnasium.spaces.Box(-np.inf, np.inf, (1,))))


def test_numbered_observations_are_no_quantities():
    gymnasium = pytest.importorskip("gymnasium")

    class Counter(gymnasium.Env):
        action_space, observation_space = gymnasium.spaces.Discrete(2), gymnasium.spaces.Discrete(3, start=4)

        def reset(self, seed=None, options=None):
            return 4, {}

        def step(self, action):
            return 5 + action, 0.0, False, False, {}

    world = host.gymnasium_world(Counter)
    assert (world.obs.shape, world.obs.dtype) == ((3,), np.float32)
    seen = [world.reset(0), world.step(0)[0], world.step(1)[0]]
    np.testing.assert_array_equal(seen, np.eye(3))


def test_a_name_that_is_none_is_one_line():
    pytest.importorskip("gymnasium")
    with pytest.raises(UserError, match="gymnasium cannot make Cart Pole"):
        host.gymnasium_world("Cart Pole")


def test_a_state_that_the_worlds_have_left_is_told():
    env = host.vector(lambda: host.from_environment(classic_control.pendulum()), 2)
    step, first = jax.jit(env.step), jax.jit(env.reset)(jax.random.key(0))
    action = jnp.zeros((2, 1))
    jax.block_until_ready(step(step(first, action), action))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Pendulum-v1 has gone on from this state"):
        jax.block_until_ready(step(first, action))
    again = jax.jit(env.reset)(jax.random.key(0))
    np.testing.assert_array_equal(again.obs, first.obs)


def area_mean(screen):
    """84 x 84 means of what each pixel covers, by sums over a picture that is finer by a common multiple."""
    height, width = screen.shape
    tall = np.repeat(screen.astype(float), 84, 0).reshape(84, height, width).mean(1)
    return np.repeat(tall, 84, 1).reshape(84, 84, width).mean(2)


def emulated(game, actions):
    """ALE frame by frame, as DQN's paper says: (screen [84, 84], reward, lives) at first and after each action."""
    ale_py = pytest.importorskip("ale_py")
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(ale_py.roms.get_rom_path(game))
    ale.reset_game()
    buttons = ale.getMinimalActionSet()
    if ale_py.Action.FIRE in buttons:
        ale.act(ale_py.Action.FIRE)
    yield area_mean(ale.getScreenGrayscale()), 0, ale.lives()
    for action in actions:
        reward, screens = 0, []
        for _ in range(4):
            reward += ale.act(buttons[action])
            screens.append(ale.getScreenGrayscale())
        yield area_mean(np.maximum(*screens[-2:])), reward, ale.lives()
        if ale.game_over():
            return


@pytest.mark.oracle
def test_atari_is_seen_as_by_dqn():
    """One whole game of Breakout whose paddle follows a fixed dance."""
    pytest.importorskip("ale_py")
    pytest.importorskip("gymnasium")
    actions = np.random.default_rng(17).integers(0, 4, 400)
    seen = list(emulated("breakout", actions))
    steps = len(seen) - 1
    assert steps < 400
    lives = np.array([life for _, _, life in seen])
    rewards = np.array([reward for _, reward, _ in seen[1:]])
    for life_loss in (False, True):
        env = host.atari("breakout", 2, noops=0, life_loss=life_loss, clip=True)
        assert (env.actions.num, env.obs.shape) == (4, (2, 84, 84, 4))

        @jax.jit
        def run(key, env=env):
            def body(world, action):
                new = env.step(world, jnp.stack([action, action]))
                return new, (world.obs[1], new.info["final_obs"][0], new)

            return jax.lax.scan(body, env.reset(key), jnp.asarray(actions[:steps]))

        last, (before, after, states) = run(jax.random.key(0))
        screens = np.stack([screen for screen, _, _ in seen])
        np.testing.assert_array_equal(before[0, ..., :3], 0)
        np.testing.assert_allclose(before[..., 3], screens[:-1], atol=1)
        np.testing.assert_allclose(after[:-1, ..., 3], screens[1:-1], atol=1)  # ALE stops amid the last four frames
        np.testing.assert_allclose(after[3:, ..., 0], screens[1 : steps - 2], atol=1)
        np.testing.assert_array_equal(states.reward[:, 0], np.sign(rewards))
        lost = np.diff(lives) < 0
        np.testing.assert_array_equal(states.terminated[:, 1], lost if life_loss else lives[1:] == 0)
        assert rewards.sum() > 3
        assert lost.sum() == 5
        if not life_loss:
            np.testing.assert_array_equal(states.info["episode_return"][-1], [rewards.sum()] * 2)
            np.testing.assert_array_equal(last.obs[0], before[0])  # the next game


@pytest.mark.oracle
def test_clipped_rewards_leave_the_points_alone():
    pytest.importorskip("ale_py")
    pytest.importorskip("gymnasium")
    env = host.atari("space_invaders", 2, clip=True)
    _, rollout = collected(env, lambda obs, keys: jnp.ones(2, jnp.int32), 150)  # who fires hits something
    np.testing.assert_array_equal(np.unique(rollout.reward), [0, 1])
    assert rollout.world["episode_return"].max() >= 5 * rollout.reward.sum(0).max() > 5


@pytest.mark.oracle
def test_one_atari_is_the_same_as_many():
    pytest.importorskip("ale_py")
    pytest.importorskip("gymnasium")
    env, world = host.atari("pong", 2), host.atari_world("pong")
    first, rollout = collected(env, lambda obs, keys: jnp.zeros(2, jnp.int32), 40)
    obs = world.reset(seed_of(jax.random.key(0), 2))
    np.testing.assert_array_equal(obs, first[0])
    assert (
        rollout.next_obs[-1, 0] != rollout.next_obs[-1, 1]
    ).any()  # after another number of frames without an action
    for t in range(40):
        obs, reward, terminated, truncated = world.step(0)
        np.testing.assert_array_equal(obs, rollout.next_obs[t, 0])
        assert (reward, terminated, truncated) == (rollout.reward[t, 0], False, False)
    assert world.actions.num == 6
    world = host.atari_world("breakout", life_loss=True)
    lost, frame = False, world.reset(0)
    while not lost:
        frame, _, lost, _ = world.step(1)
    on = world.reset()
    np.testing.assert_array_equal(on, frame)  # the same game goes on
    assert (world.reset(0)[..., :3] == 0).all()  # and here another begins


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (host.gymnasium_vector, ("CartPol-v1", 2), "gymnasium has no 'CartPol-v1': did you mean 'CartPole-v1'[?]"),
        (host.gymnasium_vector, ("CartPole-v1", 0), "0 worlds in 1 threads: choose at least 1 of each"),
        (host.gymnasium_world, ("Blackjack-v1",), r"Blackjack-v1 has observations of Tuple\(.*\): wrap it in .*"),
        (host.atari, ("pnog", 2), "ALE has no 'pnog': did you mean 'pong'[?]"),
        (host.atari, ("pong", 2, 1.5), "2 games of pong with noops=30 and sticky=1.5: choose .*"),
    ],
)
def test_what_the_libraries_do_not_know_is_one_line(make, arguments, message):
    pytest.importorskip("gymnasium")
    pytest.importorskip("ale_py")
    with pytest.raises(UserError, match=f"^{message}$"):
        make(*arguments)


@pytest.mark.parametrize("action", [jnp.zeros(3, jnp.int32), jnp.zeros((2, 1), jnp.int32), jnp.zeros(2)])
def test_wrong_actions_are_one_line(action):
    env = host.vector(lambda: host.from_environment(classic_control.cartpole()), 2)
    state = jax.eval_shape(env.reset, jax.random.key(0))
    with pytest.raises(UserError, match=r"^CartPole-v1 takes integers \(2,\) and was given .*: make them from env"):
        jax.eval_shape(env.step, state, action)

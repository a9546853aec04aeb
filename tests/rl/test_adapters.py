"""Other libraries' environments behind ours: what comes out is what the library itself gives."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.rl import classic_control
from diffrl.rl.adapters import brax, gymnax, host, playground


def trajectory(reset, step, actions):
    """The states after each action."""

    @jax.jit
    def run(key):
        first = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), reset(key))
        return jax.lax.scan(lambda state, action: (step(state, action),) * 2, first, actions)[1]

    return run


def test_a_pure_environment_is_a_world_on_the_host():
    env = classic_control.cartpole()
    world, other = host.from_environment(env), host.from_environment(env)
    first = world.reset(7)
    state = env.reset(jax.random.fold_in(jax.random.key(7), 0))
    np.testing.assert_array_equal(first, state.obs)
    step, terminated, length = jax.jit(env.step), False, 0
    while not terminated:
        obs, reward, terminated, truncated = world.step(1)
        state = step(state, np.int32(1))
        np.testing.assert_array_equal(obs, state.obs)
        assert (reward, terminated, truncated) == (1.0, bool(state.terminated), False)
        length += 1
    assert 5 < length < 20
    assert type(obs) is np.ndarray
    second = world.reset()  # goes on in the same stream of random numbers
    assert np.abs(second - first).max() > 0
    other.reset(7)
    np.testing.assert_array_equal(other.reset(), second)


@pytest.mark.oracle
def test_braxs_robots_move_as_in_brax():
    """Two of brax's steps for each of ours; the pole falls soon after the episode has been cut."""
    envs = pytest.importorskip("brax.envs")
    env = brax.make("inverted_pendulum", "spring", episode_length=9, action_repeat=2)
    theirs = envs.get_environment("inverted_pendulum", backend="spring")
    actions = jax.random.uniform(jax.random.key(1), (12, 1), minval=-1, maxval=1)
    key = jax.random.key(3)
    ours = trajectory(env.reset, env.step, actions)(key)
    wanted = trajectory(theirs.reset, theirs.step, jnp.repeat(actions, 2, 0))(jax.random.key_data(key))
    end = int(np.argmax(wanted.done)) // 2
    assert 5 < end < 12
    np.testing.assert_allclose(ours.obs[:end], wanted.obs[1::2][:end], atol=1e-5)
    np.testing.assert_allclose(ours.reward[:end], wanted.reward.reshape(-1, 2).sum(1)[:end])
    np.testing.assert_array_equal(ours.terminated[: end + 1], np.arange(end + 1) == end)
    np.testing.assert_array_equal(ours.truncated[: end + 1], (np.arange(end + 1) >= 4) & (np.arange(end + 1) < end))
    assert env.obs == jax.ShapeDtypeStruct(ours.obs.shape[1:], jnp.float32)
    page = brax.html("inverted_pendulum", [jax.tree.map(lambda x: x[i], ours) for i in range(end)])
    assert page.lstrip().startswith("<")


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("half_cheetah",), "brax has no 'half_cheetah': did you mean 'halfcheetah'?"),
        (("ant", "sprint"), "brax's physics has no 'sprint': did you mean 'spring'?"),
        (("swimmer", "spring"), "brax's swimmer does not run with spring physics: try generalized"),
    ],
)
def test_what_brax_does_not_know_is_one_line(arguments, message):
    pytest.importorskip("brax")
    with pytest.raises(UserError) as caught:
        brax.make(*arguments)
    assert str(caught.value) == message


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "brax", None)
    with pytest.raises(UserError, match=r"^brax is not installed: pip install -e '\.\[envs\]'$"):
        brax.make("ant")


def minatar_game(name):
    """MinAtar's own, without sticky actions."""
    minatar = pytest.importorskip("minatar")
    world = minatar.Environment(name, sticky_action_prob=0.0, difficulty_ramping=False)
    world.seed(0)
    world.reset()
    return world


def inject(game, inner):
    """Gymnax's state with what MinAtar's has under the same names; entities are padded with zeros."""
    known = {name: value for name, value in vars(game).items() if hasattr(inner, name)}
    if "entities" in known:
        rows = [[*map(int, entity), 1] if entity else [0] * 5 for entity in known["entities"]]
        known["entities"] = np.array(rows)
    known = {name: np.asarray(value, getattr(inner, name).dtype) for name, value in known.items()}
    return inner.replace(**known)


def towards_the_ball(game, rng):
    return 0 if game.ball_x == game.pos else 1 if game.ball_x < game.pos else 2


PLAYERS = {
    "breakout": lambda game, rng: rng.integers(3) if rng.random() < 0.02 else towards_the_ball(game, rng),
    "freeway": lambda game, rng: 1 if rng.random() < 0.9 else rng.integers(3),
    "asterix": lambda game, rng: rng.integers(5),
    "space_invaders": lambda game, rng: rng.choice([1, 2, 3, 3, 3]),
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", PLAYERS)
def test_every_step_of_minatar_is_minatars(name):
    """Each from MinAtar's own state, so that what it draws at random does not matter; steps that draw are left out."""
    pytest.importorskip("gymnax")
    world, env, rng = minatar_game(name), gymnax.minatar(name), np.random.default_rng(0)
    game, minimal = world.env, world.minimal_action_set()
    assert (env.actions.num, env.obs.shape) == (len(minimal), tuple(world.state_shape()))
    blank = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), jax.jit(env.reset)(jax.random.key(0)))
    steps, actions, seen = [], [], []
    while len(seen) < 1500:
        if name == "space_invaders" and rng.random() < 0.02:
            game.alien_map[tuple(np.argwhere(game.alien_map)[1:].T)] = 0  # soon a new wave
        if name == "breakout" and rng.random() < 0.02:
            game.brick_map[:, : rng.integers(11)] = 0
        before, spawns = inject(game, blank.inner.state), name == "asterix" and game.spawn_timer == 0
        action = int(PLAYERS[name](game, rng))
        reward, over = world.act(minimal[action])
        if not spawns:
            steps.append(before)
            actions.append(action)
            seen.append((world.state(), reward, over))
        if over:
            world.reset()
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *steps)
    run = jax.jit(
        jax.vmap(lambda inner, action: env.step(blank._replace(inner=blank.inner._replace(state=inner)), action))
    )
    states = run(stacked, np.array(actions))
    obs, reward, over = (np.array(column) for column in zip(*seen, strict=True))
    drawn = (name == "freeway") & (reward > 0)  # other cars
    np.testing.assert_array_equal(states.obs[~drawn], obs[~drawn])
    np.testing.assert_array_equal(states.reward, reward)
    np.testing.assert_array_equal(states.terminated, over)
    assert reward.sum() > 5  # the play is worth comparing
    assert over.sum() > 2 or name == "freeway"


@pytest.mark.oracle
def test_gymnaxs_limits_truncate():
    pytest.importorskip("gymnax")
    env = gymnax.minatar("freeway", episode_length=7)
    states = trajectory(env.reset, env.step, jnp.zeros(9, jnp.int32))(jax.random.key(0))
    np.testing.assert_array_equal(states.truncated, np.arange(1, 10) >= 7)
    assert not states.terminated.any()
    frame = env.render(jax.tree.map(lambda x: x[0], states))
    assert (frame.dtype, frame.shape) == (np.uint8, (240, 240, 3))
    assert len(np.unique(frame.reshape(-1, 3), axis=0)) > 3
    catch = gymnax.make("Catch-bsuite")
    states = trajectory(catch.reset, catch.step, jnp.ones(9, jnp.int32))(jax.random.key(0))
    np.testing.assert_array_equal(np.flatnonzero(states.terminated)[:1], [8])  # the ball falls through nine rows


@pytest.mark.oracle
def test_sticky_actions_repeat_the_one_before():
    """A paddle that is told to go right, and then left, ten thousand times."""
    pytest.importorskip("gymnax")
    env = gymnax.minatar("breakout", sticky=0.25)
    first = jax.jit(env.reset)(jax.random.key(0))
    held = first._replace(inner=first.inner._replace(action=jnp.int32(2)))
    keys = jax.random.split(jax.random.key(1), 10_000)
    run = jax.jit(jax.vmap(lambda key: env.step(held._replace(inner=held.inner._replace(key=key)), jnp.int32(1))))
    states = run(keys)
    stuck = np.asarray(states.obs[:, 9, 5, 0] == 1)
    assert abs(stuck.mean() - 0.25) < 0.02
    np.testing.assert_array_equal(states.inner.action, np.where(stuck, 2, 1))


class Lottery:
    """A game in gymnax's form whose every step pays a uniform number."""

    def action_space(self, params):
        return types.SimpleNamespace(n=3)

    def reset_env(self, key, params):
        return jnp.zeros(1), jnp.zeros(())

    def step_env(self, key, state, action, params):
        return jnp.zeros(1), state, jax.random.uniform(key), jnp.zeros((), bool), {}

    def is_truncated(self, state, params):
        return jnp.zeros((), bool)


def test_whether_an_action_sticks_says_nothing_of_what_the_world_draws(monkeypatch):
    """The mean pay is 1/2 where it stuck and where it did not, 4000 draws or more of each."""
    monkeypatch.setattr(gymnax, "_library", lambda name: (Lottery(), None))
    env = gymnax.minatar("breakout", sticky=0.5)
    keys = jax.random.split(jax.random.key(0), 10_000)
    states = jax.jit(jax.vmap(lambda key: env.step(env.reset(key), jnp.int32(1))))(keys)
    stuck, pay = np.asarray(states.inner.action == 0), np.asarray(states.reward)
    for those in (stuck, ~stuck):
        assert those.sum() > 4000
        assert abs(pay[those].mean() - 0.5) < 4 * (1 / 12 / 4000) ** 0.5


@pytest.mark.oracle
@pytest.mark.parametrize("ramping", [False, True])
def test_games_get_harder_where_they_should(ramping):
    """Invaders that have lost a wave move every 11 instead of 12 frames; Asterix' enemies come more often in time."""
    pytest.importorskip("gymnax")

    def after(name, **changes):
        env = gymnax.minatar(name, ramping=ramping)

        @jax.jit
        def run(key, changes):
            first = env.reset(key)
            changed = first.inner.state.replace(**changes)
            return env.step(first._replace(inner=first.inner._replace(state=changed)), jnp.int32(0)).inner.state

        return run(jax.random.key(0), changes)

    assert after("space_invaders", alien_map=jnp.zeros((10, 10))).enemy_move_interval == (11 if ramping else 12)
    assert after("asterix", ramp_timer=jnp.int32(-1)).spawn_speed == (9 if ramping else 10)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (gymnax.minatar, ("brekout",), "MinAtar has no 'brekout': did you mean 'breakout'?"),
        (gymnax.minatar, ("breakout", 1.5), "actions stick with probability 1.5: choose one within [0, 1]"),
        (gymnax.make, ("Cach-bsuite",), "gymnax has no 'Cach-bsuite': did you mean 'Catch-bsuite'?"),
    ],
)
def test_what_gymnax_does_not_know_is_one_line(make, arguments, message):
    pytest.importorskip("gymnax")
    with pytest.raises(UserError) as caught:
        make(*arguments)
    assert str(caught.value) == message


@pytest.mark.oracle
def test_the_control_suite_is_playgrounds():
    suite = pytest.importorskip("mujoco_playground").dm_control_suite
    env = playground.make("PendulumSwingup", 12)
    theirs = suite.load("PendulumSwingup", config_overrides={"impl": "jax"})
    actions = jax.random.uniform(jax.random.key(1), (15, 1), minval=-1, maxval=1)
    key = jax.random.key(3)
    ours = trajectory(env.reset, env.step, actions.at[14].set(jnp.nan))(key)
    wanted = trajectory(theirs.reset, theirs.step, actions)(key)
    np.testing.assert_array_equal(ours.obs[:14], wanted.obs[:14])
    np.testing.assert_array_equal(ours.reward[:14], wanted.reward[:14])
    np.testing.assert_array_equal(ours.truncated, [False] * 11 + [True] * 3 + [False])
    np.testing.assert_array_equal(ours.terminated, [False] * 14 + [True])  # what is not a number breaks the world
    np.testing.assert_array_equal(ours.obs[14], ours.obs[13])
    assert ours.reward[14] == 0
    assert env.obs == jax.ShapeDtypeStruct(ours.obs.shape[1:], jnp.float32)
    assert (env.actions.shape, env.actions.low, env.actions.high) == ((1,), -1, 1)


@pytest.mark.oracle
def test_what_playground_does_not_know_is_one_line():
    pytest.importorskip("mujoco_playground")
    with pytest.raises(UserError, match=r"^playground has no 'CheetaRun': did you mean 'CheetahRun'\?$"):
        playground.make("CheetaRun")

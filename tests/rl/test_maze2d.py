"""Maze2D against MuJoCo itself, its controller and random policy against D4RL's published returns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.rl import controllers, demonstrations, maze2d, mazes, waypoints

NAMES = list(mazes.STANDARD)


@functools.cache
def simulator(name):
    walls = mazes.standard(name).walls
    return jax.jit(lambda p, v, a: maze2d.simulate(jnp.asarray(walls), p, v, a))


def walk(name, steps, seed):
    """(position, velocity, action, whether MuJoCo saw a contact, position and velocity after it), step by step."""
    mujoco = pytest.importorskip("mujoco")
    maze = mazes.standard(name)
    model = mujoco.MjModel.from_xml_string(maze2d.mjcf(maze))
    data, rng = mujoco.MjData(model), np.random.default_rng(seed)
    for t in range(steps):
        if t % 400 == 0:
            data.qpos[:] = maze.free[rng.integers(len(maze.free))] + rng.uniform(-0.1, 0.1, 2)
            data.qvel[:] = 0
        if t % 40 == 0:
            action = rng.uniform(-1.5, 1.5, 2)
        data.qvel[:] = np.clip(data.qvel, -5, 5)
        position, velocity = data.qpos.copy(), data.qvel.copy()
        data.ctrl[:] = np.clip(action, -1, 1)
        mujoco.mj_step(model, data)
        yield position, velocity, action, data.ncon, np.concatenate([data.qpos, data.qvel])


@pytest.mark.parametrize("name", NAMES)
def test_every_step_is_mujocos(name):
    touched = corners = 0
    for position, velocity, action, contacts, after in walk(name, 1200, seed=3):
        error = np.abs(np.concatenate(simulator(name)(position, velocity, action)) - after).max()
        # At walls float32 loses the last digits of the depth, which contacts multiply by thousands.
        assert error < (2e-4 if contacts else 1.5e-6), (position, velocity, action, contacts)
        touched, corners = touched + (contacts > 0), corners + (contacts > 1)
    assert touched > 100
    assert corners > 10


def test_in_double_precision_walls_are_mujocos_too():
    with jax.enable_x64(True):
        step = jax.jit(lambda p, v, a: maze2d.simulate(jnp.asarray(mazes.standard("medium").walls), p, v, a))
        for position, velocity, action, _, after in walk("medium", 800, seed=4):
            assert np.abs(np.concatenate(step(position, velocity, action)) - after).max() < 1e-8


def test_long_flights_stay_together():
    """The same actions, without looking at MuJoCo again, as long as nothing is touched."""
    mujoco = pytest.importorskip("mujoco")
    model = mujoco.MjModel.from_xml_string(maze2d.mjcf(mazes.standard("umaze")))
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:] = (3, 2), 0
    position, velocity = jnp.array([3.0, 2.0]), jnp.zeros(2)
    for t in range(200):
        action = 0.5 * np.array([np.cos(t / 5), np.cos(t / 7)])
        data.ctrl[:] = action
        mujoco.mj_step(model, data)
        position, velocity = simulator("umaze")(position, velocity, action)
        assert not data.ncon
    assert np.abs(position - data.qpos).max() < 1e-5


@pytest.mark.parametrize("reward", ["sparse", pytest.param("dense", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_reference_returns_are_d4rls(name, reward):
    """D4RL's constants are means of 100 episodes; ours, of 400, lie within two standard errors of such means."""
    maze, (_, steps, references) = mazes.standard(name), mazes.STANDARD[name]
    env = maze2d.make(maze, steps, reward)
    keys = jax.random.split(jax.random.key(1), 400)
    for policy, reference in zip(
        (controllers.uniform(env), waypoints.controller(maze, stale=True)), references[reward], strict=True
    ):
        returns = np.asarray(jax.jit(controllers.execute(env, policy, steps))(keys).episode_return)
        error = returns.std() * np.sqrt(1 / 100 + 1 / 400)
        assert abs(returns.mean() - reference) < 2 * error


def test_controller_with_waypoints_arrives_everywhere():
    maze = mazes.standard("large")
    env = maze2d.make(maze, 800)
    run = controllers.execute(env, waypoints.controller(maze), 800)
    returns = jax.jit(run)(jax.random.split(jax.random.key(0), 64)).episode_return
    assert (returns > 200).all()


@functools.cache
def demonstrated(name="medium", count=20_000):
    return demonstrations.maze_walk(mazes.standard(name), count, mazes.STANDARD[name][1], seed=2, chains=10)


def test_demonstrations_follow_the_protocol():
    made = demonstrated()
    changes = made.timeouts.copy()
    changes[1999::2000] = False
    t = np.flatnonzero(changes[:-1])
    # After a change of target the observation is seen once more, and the target is another from then on.
    np.testing.assert_array_equal(made.observations[t + 1], made.observations[t])
    assert (made.goals[t + 1] != made.goals[t]).any(1).all()
    same = np.flatnonzero(~made.timeouts[:-1])
    np.testing.assert_array_equal(made.goals[same], made.goals[same + 1])
    # Targets are given up only when time is up; all others are reached.
    near = np.linalg.norm(made.observations[t, :2] - np.rint(made.goals[t]), axis=1) < 0.1
    assert near.mean() > 0.95
    assert np.abs(made.actions).max() <= 1
    assert made.observations.dtype == np.float32
    distance = np.linalg.norm(made.observations[:, :2] - mazes.standard("medium").goal, axis=1)
    np.testing.assert_array_equal(made.rewards, distance <= 0.5)
    assert not made.terminals.any()


def test_demonstrations_are_steps_of_the_world():
    made = demonstrated()
    t = np.flatnonzero(~made.timeouts[1:-1] & ~made.timeouts[:-2])[:2000] + 1
    step = jax.jit(jax.vmap(lambda p, v, a: maze2d.simulate(jnp.asarray(mazes.standard("medium").walls), p, v, a)))
    position, velocity = step(made.observations[t, :2], made.observations[t, 2:], made.actions[t])
    np.testing.assert_allclose(np.concatenate([position, velocity], 1), made.observations[t + 1], atol=1e-4)


def test_demonstrations_spread_over_the_maze_and_its_targets():
    made, maze = demonstrated(count=60_000), mazes.standard("medium")
    targets = {tuple(cell) for cell in np.rint(made.goals).astype(int)}
    assert targets == {tuple(cell) for cell in maze.free}
    inside = np.rint(made.observations[:, :2] + 0.2).astype(int)
    assert not maze.walls[tuple(inside.T)].any()
    # Actions are a saturated controller's, with noise of 0.5.
    assert 0.2 < (np.abs(made.actions) == 1).mean() < 0.6


def test_next_cells_walk_shortest_ways():
    maze = mazes.standard("large")
    table, columns = mazes.next_cells(maze), maze.walls.shape[1]
    for goal in maze.free[::7]:
        number = goal[0] * columns + goal[1]
        steps = mazes.distances(maze, tuple(goal)).reshape(-1)
        free = (~maze.walls).reshape(-1)
        after = table[number]
        assert (steps[after[free]] == np.maximum(steps[free] - 1, 0)).all()


def test_values_agree_with_the_tabular_solver():
    """Q-iteration's greedy cells are optimal for the same maze as a Markov decision process."""
    maze = mazes.standard("umaze")
    to = mazes.neighbours(maze)
    goal = maze.goal[0] * maze.walls.shape[1] + maze.goal[1]
    value = np.zeros(maze.walls.size)
    for _ in range(3000):
        value = (np.arange(len(value)) == goal) + 0.99 * value[to].max(1)
    chosen = mazes.next_cells(maze)[goal]
    free = (~maze.walls).reshape(-1)
    np.testing.assert_allclose(value[chosen[free]], value[to].max(1)[free])


@pytest.mark.long
def test_random_goals_and_rewards():
    maze = mazes.standard("umaze")
    env = maze2d.make(maze, 300, random_goal=True)
    keys = jax.random.split(jax.random.key(0), 256)
    states = jax.vmap(env.reset)(keys)
    cells = {tuple(cell) for cell in np.rint(states.info["goal"]).astype(int)}
    assert cells == {tuple(cell) for cell in maze.free}
    either = jax.jit(lambda random: jax.vmap(maze2d.make(maze, 300, random_goal=random).reset)(keys))
    np.testing.assert_allclose(either(True).info["goal"], states.info["goal"], atol=1e-6)
    assert (either(False).info["goal"] == np.array(maze.goal)).all()
    np.testing.assert_allclose(either(False).obs, states.obs, atol=1e-6)
    dense = maze2d.make(maze, 300, "dense")
    state = dense.step(dense.reset(jax.random.key(0)), jnp.zeros(2))
    np.testing.assert_allclose(state.reward, np.exp(-np.linalg.norm(state.obs[:2] - np.array(maze.goal))), rtol=1e-6)


def test_picture_shows_walls_and_ball():
    maze = mazes.standard("umaze")
    env = maze2d.make(maze, 300)
    picture = env.render(env.reset(jax.random.key(0)))
    assert picture.shape == (240, 240, 3)
    assert picture.dtype == np.uint8
    wall, free = picture[24, 24], picture[24 + 48, 24 + 96]
    assert (wall != free).any()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("####/#OO/####", "row 2"),
        ("####/#OX#/####", "'X'"),
        ("#####/#G#G#/#####", "2 goals"),
        ("###/###", "no free cell"),
        ("####/#OOO/####", "open at its edge"),
        ("#####/#O#G#/#####", "cannot be solved"),
    ],
)
def test_bad_mazes_are_one_line(text, words):
    with pytest.raises(UserError, match=words):
        mazes.parse(text.replace("/", "\n"))


def test_bad_names_places_and_rewards_are_one_line():
    with pytest.raises(UserError, match="medium"):
        mazes.standard("medum")
    maze = mazes.standard("umaze")
    assert mazes.free_cell(maze, (1.1, 2.9), "start") == (1, 3)
    with pytest.raises(UserError, match="in a wall"):
        mazes.free_cell(maze, (2, 1), "start")
    with pytest.raises(UserError, match="outside"):
        mazes.free_cell(maze, (2, 9), "start")
    with pytest.raises(UserError, match="sparse or dense"):
        maze2d.make(maze, 300, "sprase")

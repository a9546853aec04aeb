"""Plans carried out: open loop, receding horizon, warm start, in one program and step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.diffusion.sampling import sample_keys
from diffrl.errors import UserError
from diffrl.planning import policies
from diffrl.planning.diffuser import Planner
from diffrl.planning.plans import Plan, Space
from diffrl.rl import controllers, maze2d, mazes
from diffrl.rl.environment import Actions, Environment, State
from diffrl.rl.wrappers import time_limit

SPACE = Space(horizon=6, actions=2, observations=4)
OFF = jnp.zeros((), bool)


def counting(limit=12):
    """A world that adds its actions up; the goal is (7, 7)."""

    def reset(key):
        obs = jnp.zeros(4)
        return State(obs, obs, jnp.zeros(()), OFF, OFF, {"goal": jnp.full((2,), 7.0)})

    def step(state, action):
        obs = state.obs.at[:2].add(action)
        return State(obs, obs, action.sum(), OFF, OFF, state.info)

    return time_limit(Environment("count", reset, step, Actions(shape=(2,)), None), limit)


def straight(space=SPACE, seen=None):
    """A planner without a network: actions count the rows of plans, 1, 2, ...; `again` adds 100 to them."""
    seen = [] if seen is None else seen

    def plan(keys, obs, goal=None, arrival=None):
        rows = jnp.arange(1.0, space.horizon + 1)[None, :, None]
        actions = jnp.broadcast_to(rows, (len(obs), space.horizon, 2))
        return jnp.concatenate([actions, obs[:, None] + 0 * rows + jnp.pad(rows, ((0, 0), (0, 0), (0, 3)))], axis=2)

    def again(keys, obs, goal, arrival, x, rows):
        seen.append((goal is not None, arrival is not None))
        shift = 0 if arrival is None else jnp.reshape(arrival, (-1, 1, 1))
        return plan(keys, obs).at[..., :2].add(100.0 * rows) + shift

    return Planner(space, plan, again)


def actions_of(controller, env, steps=12, worlds=3):
    run = controllers.execute(env, controller, steps, keep=lambda world, carry, action: action)
    episodes, taken = jax.jit(run)(sample_keys(jax.random.key(0), worlds))
    assert np.ptp(taken, axis=1).max() == 0
    return np.asarray(taken)[:, 0, 0], episodes


def test_open_loop_carries_out_one_plan_and_holds_its_last_action():
    taken, episodes = actions_of(policies.controller(straight(), policies.planned_actions), counting())
    np.testing.assert_array_equal(taken, [1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6, 6])
    np.testing.assert_array_equal(episodes.episode_return, 2 * taken.sum())
    np.testing.assert_array_equal(episodes.episode_length, 12)
    assert episodes.done.all()


def test_receding_horizon_plans_anew_after_so_many_steps():
    taken, _ = actions_of(policies.controller(straight(), policies.planned_actions, every=4), counting())
    np.testing.assert_array_equal(taken, [1, 2, 3, 4, 401, 402, 403, 404, 401, 402, 403, 404])


@pytest.mark.parametrize(("remaining", "made"), [(1, {2: 3, 4: 1}), (2, {2: 3}), (4, {})])
def test_goals_come_nearer_where_they_stay_at_their_time(remaining, made):
    """Plans at 2, 4, ... know how many rows there are to go, and none is made when there are fewer than `remaining`."""
    seen, want = [], np.array([1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6, 6])
    for time, ahead in made.items():
        want[time:] = np.minimum(np.arange(1, 13 - time), 6) + 200 + ahead
    options = {"every": 2, "remaining": remaining}
    taken, _ = actions_of(
        policies.controller(straight(seen=seen), policies.planned_actions, goal=lambda world: world.obs, **options),
        counting(),
    )
    np.testing.assert_array_equal(taken, want)
    assert all(given == (True, True) for given in seen)
    assert policies.plans_made(SPACE, 12, **options) == 1 + len(made)


def test_plans_are_counted():
    """In episodes of 12 steps, of which the last has the number 11."""
    counts = [policies.plans_made(SPACE, 12, every=every) for every in (0, 1, 2, 4, 5)]
    assert counts == [1, 12, 6, 3, 3]


def test_plans_stay_where_they_arrive():
    """Observations after the pinned row are the goal's; (7, 7) at rest."""
    goal = jnp.array([[7.0, 7.0, 0.0, 0.0]])

    def aim(world):
        return jnp.broadcast_to(goal, world.obs.shape)

    controller = policies.controller(straight(), policies.planned_actions, every=2, remaining=1, goal=aim)
    keep = lambda world, carry, action: carry.plan.observations  # noqa: E731
    _, plans = jax.jit(controllers.execute(counting(), controller, 6, keep))(sample_keys(jax.random.key(0), 2))
    staying = (np.asarray(plans) == goal).all(-1)
    np.testing.assert_array_equal(staying[2, 0], [False, False, False, True, True, True])  # made at 2: 3 steps ahead
    np.testing.assert_array_equal(staying[4, 0], [False, True, True, True, True, True])


def test_strides_are_steps_of_the_world():
    space = SPACE._replace(stride=2)
    taken, _ = actions_of(policies.controller(straight(space), policies.planned_actions, every=4), counting(8))
    np.testing.assert_array_equal(taken[:8], [1, 1, 2, 2, 201, 201, 202, 202])
    with pytest.raises(UserError, match="multiple of 2"):
        policies.controller(straight(space), policies.planned_actions, every=3)


@pytest.mark.parametrize(("options", "words"), [({"every": 6}, "every 6 steps"), ({"remaining": 9}, "remaining=9")])
def test_plans_that_do_not_reach_are_one_line(options, words):
    with pytest.raises(UserError, match=words):
        policies.controller(straight(), policies.planned_actions, **options)


def test_waypoints_by_hand():
    seen = jnp.array([[[0.0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]])
    plan, obs = Plan(jnp.zeros((1, 3, 2)), seen), jnp.array([[0.5, 0.5, 1.0, 2.0]])
    np.testing.assert_allclose(policies.towards_waypoints()(plan, 0, obs)[0], [0.5 + 2, 1.5 + 2])
    np.testing.assert_allclose(policies.towards_waypoints(10.0)(plan, 0, obs)[0], [5 + 2, 15 + 2])
    # After the end: the last position, at rest.
    np.testing.assert_allclose(policies.towards_waypoints()(plan, 5, obs)[0], [4.5 - 1, 5.5 - 2])
    space = SPACE._replace(encode=lambda x: x / 2, decode_action=lambda a: 10 * a)
    act = policies.inverse_dynamics(space, lambda before, after: (after - before)[:, :2])
    np.testing.assert_allclose(act(plan, 1, obs)[0], [10 * (5 - 0.5) / 2, 10 * (6 - 0.5) / 2])


@pytest.mark.long
def test_one_program_is_the_same_as_step_by_step():
    """A real maze, planning every 3 steps; jit against no jit."""
    env = maze2d.make(mazes.standard("umaze"), 10)
    controller = policies.controller(straight(), policies.towards_waypoints(), every=3)
    keys = sample_keys(jax.random.key(4), 2)
    run = controllers.execute(env, controller, 10, keep=lambda world, carry, action: (world.obs, action))
    episodes, (obs, actions) = jax.jit(run)(keys)
    with jax.disable_jit():
        again, (obs2, actions2) = run(keys)
    np.testing.assert_allclose(obs, obs2, atol=1e-5)
    np.testing.assert_allclose(actions, actions2, atol=1e-5)
    np.testing.assert_allclose(episodes.episode_return, again.episode_return)


def test_worlds_that_have_ended_stand_still_and_earn_nothing():
    def reset(key):
        length = jax.random.randint(key, (), 1, 6)
        return State(length, jnp.zeros(4), jnp.zeros(()), OFF, OFF, {})

    def step(state, action):
        return State(state.inner - 1, state.obs + 1, jnp.ones(()), state.inner - 1 == 0, OFF, {})

    env = Environment("short", reset, step, Actions(shape=(2,)), None)
    run = controllers.execute(env, controllers.uniform(env), 9, keep=lambda world, carry, action: world.obs)
    episodes, obs = run(sample_keys(jax.random.key(0), 32))
    assert episodes.done.all()
    assert np.ptp(episodes.episode_length) > 2
    np.testing.assert_array_equal(episodes.episode_return, episodes.episode_length)
    np.testing.assert_array_equal(obs[-1, :, 0], episodes.episode_length)

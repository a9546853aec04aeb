"""Other libraries' environments behind ours: what comes out is what the library itself gives."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.rl import classic_control
from diffrl.rl.adapters import brax, host


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

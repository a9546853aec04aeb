"""Plans: what is pinned, what is padded, exact bridges, candidates, warm starts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.diffusion import losses, prediction, samplers, times
from diffrl.diffusion import process as processes
from diffrl.diffusion.sampling import Info, Sampler, State, sample_keys
from diffrl.errors import UserError
from diffrl.planning import diffuser, plans
from diffrl.planning.diffuser import Draws
from diffrl.planning.plans import Space

PROCESS = processes.cosine()
GRID = times.linear_grid(30, 0.999)
KEYS = sample_keys(jax.random.key(0), 4000)
WALK = Space(horizon=9, actions=1, observations=2)  # a Brownian motion in two dimensions; its action is noise
SCALED = Space(5, 2, 3, lambda x: x / 10, lambda x: x * 10, lambda a: a / 2, lambda a: 2 * a, stride=4)


def bridge(space, spread=1.0):
    """The exact denoiser of a Brownian motion whose ends are shown clean, and its mean and covariance in float64."""
    inner = space.horizon - 2
    steps = np.arange(1, space.horizon - 1)
    last = space.horizon - 1
    covariance = spread**2 * (np.minimum.outer(steps, steps) - np.outer(steps, steps) / last) / last

    def denoise(x, t, cond):
        alpha, sigma = (expand(f(t)) for f in PROCESS)
        ends = x[:, [0, -1], space.actions :]
        share = (steps / last)[None, :, None]
        mean = (1 - share) * ends[:, :1] + share * ends[:, 1:]
        gain = alpha * jnp.linalg.solve(
            (alpha**2)[..., 0][:, None] * covariance + (sigma**2)[..., 0][:, None] * np.eye(inner), covariance
        ).swapaxes(1, 2)
        free = x[:, 1:-1, space.actions :]
        guess = mean + jnp.einsum("bij,bjd->bid", gain, free - alpha * mean)
        seen = jnp.concatenate([ends[:, :1], guess, ends[:, 1:]], axis=1)
        acted = alpha * x[..., : space.actions] / (alpha**2 + sigma**2)  # actions are N(0, 1)
        return jnp.concatenate([acted, seen], axis=2)

    def expand(a):
        return a[:, None, None]

    return denoise, covariance


def draws(space=WALK, **changed):
    sampler = samplers.ancestral(PROCESS, bridge(space)[0], 1.0)
    return Draws(PROCESS, lambda fixed: sampler, GRID, **changed)


@functools.cache
def bridged():
    """Plans from (0, 0) to (3, -3)."""
    planner = diffuser.planner(WALK, draws())
    obs, goal = jnp.zeros((4000, 2)), jnp.tile(jnp.array([3.0, -3.0]), (4000, 1))
    return np.asarray(jax.jit(planner.plan)(KEYS, obs, goal))


def test_plans_between_pinned_ends_are_brownian_bridges():
    """With the exact conditional denoiser the sampler draws from the exact conditional: a conjugate posterior."""
    x, covariance = bridged(), bridge(WALK)[1]
    np.testing.assert_array_equal(x[:, 0, 1:], 0.0)
    np.testing.assert_array_equal(x[:, -1, 1:], np.broadcast_to([3.0, -3.0], (4000, 2)))
    line = np.linspace([0, 0], [3, -3], 9)
    np.testing.assert_allclose(x[..., 1:].mean(0), line, atol=0.03)
    for d in (1, 2):
        np.testing.assert_allclose(np.cov(x[:, 1:-1, d].T), covariance, atol=0.03)
    np.testing.assert_allclose(x[..., 0].std(0), 1.0, atol=0.05)


def test_temperature_is_of_the_noise_that_plans_begin_with_too():
    """A sampler that does nothing leaves the noise, but for what is pinned."""
    idle = Sampler(State, lambda keys, state, t, s, cond: (state, Info(state.x, state.x, jnp.zeros(()))))
    cold = draws()._replace(sampler=lambda fixed: idle, temperature=0.5)
    x = jax.jit(diffuser.planner(WALK, cold).plan)(KEYS, jnp.zeros((4000, 2)))
    np.testing.assert_allclose(np.asarray(x)[:, 1:].std(), 0.5, atol=0.01)


def test_a_plan_depends_on_its_own_key_alone():
    planner = diffuser.planner(WALK, draws())
    goal = jnp.tile(jnp.array([3.0, -3.0]), (3, 1))
    few = jax.jit(planner.plan)(KEYS[5:8], jnp.zeros((3, 2)), goal)
    np.testing.assert_allclose(few, bridged()[5:8], atol=1e-4)


def test_the_best_candidate_is_taken():
    """The largest of four draws of the middle: its mean is known from order statistics."""

    def score(x, goal):
        assert goal.shape == (len(x), 2)
        return x[:, 4, 1]

    planner = diffuser.planner(WALK, draws(candidates=4, score=score))
    x = jax.jit(planner.plan)(KEYS[:2000], jnp.zeros((2000, 2)), jnp.zeros((2000, 2)))
    expected = 1.0294 * np.sqrt(bridge(WALK)[1][3, 3])  # E max of four standard normals
    np.testing.assert_allclose(x[:, 4, 1].mean(), expected, atol=0.03)
    np.testing.assert_allclose(x[:, 4, 2].mean(), 0.0, atol=0.04)
    with pytest.raises(UserError, match="nothing ranks them"):
        diffuser.planner(WALK, draws(candidates=4))
    with pytest.raises(UserError, match="candidates=0"):
        diffuser.planner(WALK, draws(candidates=0))


def test_a_warm_start_keeps_to_the_plan_before_as_far_as_it_is_not_noised():
    goal = jnp.tile(jnp.array([3.0, -3.0]), (500, 1))
    before = jnp.asarray(bridged()[:500])
    moved = plans.shifted(before, 2)

    def distance(level):
        warm = GRID[int(jnp.argmin(jnp.abs(GRID - level))) :]
        planner = diffuser.planner(WALK, draws(warm_times=warm))
        x = jax.jit(planner.again)(KEYS[1000:1500], moved[:, 0, 1:], goal, None, before, 2)
        np.testing.assert_array_equal(x[:, 0, 1:], moved[:, 0, 1:])
        np.testing.assert_array_equal(x[:, -1, 1:], goal)
        return float(jnp.abs(x - moved)[:, 1:5, 1:].mean())

    near, far = distance(0.1), distance(0.9)
    assert near < 0.4 * far
    cold = diffuser.planner(WALK, draws())
    again = cold.again(KEYS[:5], moved[:5, 0, 1:], goal[:5], None, before[:5], 2)
    plan = cold.plan(KEYS[:5], moved[:5, 0, 1:], goal[:5])
    np.testing.assert_array_equal(again, plan)


def test_pins_and_units():
    obs, goal = jnp.array([[10.0, 20.0, 30.0]]), jnp.array([[40.0, 50.0, 60.0]])
    value, mask = plans.pins(SCALED, obs, goal)
    assert value.shape == mask.shape == (1, 5, 5)
    assert SCALED.span == 16
    np.testing.assert_array_equal(np.argwhere(mask[0]), [[h, d] for h in (0, 4) for d in (2, 3, 4)])
    np.testing.assert_allclose(value[0, 0, 2:], [1, 2, 3])
    np.testing.assert_allclose(value[0, 4, 2:], [4, 5, 6])
    _, first = plans.pins(SCALED, obs)
    assert first[0, 0, 2:].all()
    assert first.sum() == 3
    value, early = plans.pins(SCALED, jnp.tile(obs, (2, 1)), jnp.tile(goal, (2, 1)), jnp.array([1, 3]))
    np.testing.assert_array_equal(np.argwhere(early[:, :, 2]), [[0, 0], [0, 1], [1, 0], [1, 3]])
    np.testing.assert_allclose(value[1, 3, 2:], [4, 5, 6])


def test_between_rows_a_plan_goes_straight():
    x = jnp.arange(25.0).reshape(1, 5, 5)
    plan = plans.unpack(SCALED, x)
    assert plan.observations.shape == (1, 17, 3)
    assert plan.actions.shape == (1, 17, 2)
    np.testing.assert_allclose(plan.observations[0, ::4], 10 * x[0, :, 2:])
    np.testing.assert_allclose(np.diff(plan.observations[0], axis=0), 50 / 4)
    np.testing.assert_allclose(plan.actions[0, 4:8], np.tile(2 * x[0, 1, :2], (4, 1)))
    np.testing.assert_allclose(plans.shifted(x, 3)[0, :, 0], [15, 20, 20, 20, 20])


# --- The loss --------------------------------------------------------------------------------------------------------

X = jax.random.normal(jax.random.key(3), (6, 9, 3))
MASK = (jnp.arange(9) < jnp.array([9, 9, 7, 5, 3, 1])[:, None]).astype(jnp.float32)
HEAD = prediction.x0_head(PROCESS)


def loss(model, x=X, mask=MASK, **options):
    denoising = losses.denoising(PROCESS, HEAD, times.uniform(0.1, 0.9))
    return diffuser.objective(denoising, WALK, **options)(model, x, mask, None, KEYS[: len(x)])[0]


def convolution(x, t, cond):
    """A network that looks at its neighbours in time, as the U-Net does."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    return jnp.tanh(padded[:, :-2] + 0.5 * x - padded[:, 2:] + t[:, None, None])


def test_the_loss_does_not_depend_on_what_lies_behind_a_path():
    behind = jnp.where(MASK[..., None] == 0, 1e3, 0.0)
    zero = jnp.where(MASK[..., None] == 0, 0.0, X)  # as windows come

    def model(x, t, cond):
        assert (jnp.where(MASK[..., None] == 0, x, 0.0) == 0).all()  # padding is shown as 0, not as noise
        return convolution(x, t, cond)

    clean = loss(model, zero)
    # What the network says about padding makes no error either.
    babble = loss(lambda x, t, cond: model(x, t, cond) + behind, zero)
    np.testing.assert_array_equal(clean, babble)
    assert float(clean[-1]) > 0  # one row is left: its action


def test_more_padding_changes_nothing_for_a_local_network():
    """The same paths in windows of 9 rows and of 5; without noise, which differs where the shapes do."""
    silent = processes.Process(PROCESS.alpha, lambda t: 0.0 * t)
    denoising = losses.denoising(silent, prediction.x0_head(PROCESS), times.uniform(0.1, 0.9))
    whole = jnp.where(MASK[..., None] == 0, 0.0, X)[3:5]  # paths of 5 and 3 rows

    def value(space, x, mask):
        objective = diffuser.objective(denoising, space, goal=False, action_weight=3.0)
        return objective(lambda x, t, cond: jnp.tanh(x + t[:, None, None]), x, mask, None, KEYS[:2])[0]

    short = value(WALK._replace(horizon=5), whole[:, :5], MASK[3:5, :5])
    np.testing.assert_allclose(value(WALK, whole, MASK[3:5]), short, rtol=1e-6)
    assert (short > 0.01).all()


def test_ends_are_shown_clean_and_make_no_error():
    full = jnp.ones_like(MASK)

    def model(x, t, cond):
        np.testing.assert_array_equal(x[:, [0, -1], 1:], X[:, [0, -1], 1:])
        assert (x[:, 0, 0] != X[:, 0, 0]).all()
        assert (x[:, 1:-1] != X[:, 1:-1]).all()
        return X.at[:, [0, -1], 1:].set(1e3)  # right everywhere else

    np.testing.assert_array_equal(loss(model, mask=full), 0.0)
    only_start = loss(lambda x, t, cond: X.at[:, 0, 1:].set(1e3), mask=full, goal=False)
    np.testing.assert_array_equal(only_start, 0.0)
    assert (loss(lambda x, t, cond: X.at[:, -1, 1:].add(1.0), mask=full, goal=False) > 0).all()


def test_goals_anywhere_are_pinned_at_the_end_half_of_the_time():
    many, seen = jnp.tile(X[:1], (3000, 1, 1)), []

    def model(x, t, cond):
        seen.append((x == many)[:, 1:, 1:].all(-1))
        row = np.argmax(seen[0], axis=1) + 1  # of which it is told, and what is there
        np.testing.assert_allclose(cond["value"][:, -1], 2 * row / 8 - 1, atol=1e-6)
        np.testing.assert_array_equal(cond["value"][:, :-1], np.asarray(many)[np.arange(3000), row, 1:])
        return x

    loss(model, many, jnp.ones((3000, 9)), any_arrival=True)
    pinned = np.asarray(seen[0])
    assert (pinned.sum(1) == 1).all()
    share = pinned.mean(0)
    np.testing.assert_allclose(share[-1], 0.5 + 0.5 / 8, atol=0.04)
    np.testing.assert_allclose(share[:-1], 0.5 / 8, atol=0.02)


def test_weights_of_actions_and_of_time():
    full = jnp.ones_like(MASK)

    def off(row, column):
        return lambda x, t, cond: X.at[:, row, column].add(1.0)

    first = [float(loss(off(0, 0), mask=full, action_weight=w, goal=False)[0]) for w in (1.0, 10.0)]
    free = 9 * 3 - 2
    np.testing.assert_allclose(first, [1 / free, 10 / (free + 9)], rtol=1e-5)
    early, late = (float(loss(off(row, 1), mask=full, discount=0.5)[0]) for row in (1, 4))
    np.testing.assert_allclose(early / late, 8.0, rtol=1e-4)

"""Averages of any width come out of two that were tracked; the oracle is an average that was tracked all along."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from tiny_networks import DIT, SMALL, Problem, grid

from diffrl.errors import UserError
from diffrl.train import mesh, post_hoc
from diffrl.train.checkpoint import Checkpoints
from diffrl.train.loop import fit, resume
from diffrl.train.state import Aux, create
from diffrl.train.step import global_step, make_update, repeat

STEPS, EVERY = 2000, 50
OTHERS = (0.07, 0.12, 0.15)
WIDTHS = (*post_hoc.STORED, *OTHERS)


@pytest.fixture
def snapshots(tmp_path):
    made = Checkpoints(tmp_path / "snapshots", keep=None)
    yield made
    made.close()


def path_of(t):
    """A trajectory: a walk, waves that are shorter and longer than the averages, and the first moments of time."""
    walk = np.cumsum(np.random.default_rng(0).normal(size=(STEPS + 1, 3)), axis=0) / 40
    waves = jnp.stack([jnp.sin(t / 7), jnp.sin(t / 150), jnp.log1p(t)])
    return {"walk": jnp.asarray(walk, jnp.float32)[t], "waves": waves, "time": t / STEPS, "square": (t / STEPS) ** 2}


def follower(widths):
    """A step whose parameters after t updates are path_of(t)."""

    def loss(params, state, batch, keys):
        apart = jax.tree.map(jnp.subtract, params, path_of(state.step + 1))
        return optax.tree_utils.tree_l2_norm(apart, squared=True) / 2, Aux({})

    return global_step(make_update(loss, optax.sgd(1.0), profiles=widths))


@functools.cache
def followed():
    """The state every EVERY updates, all widths tracked."""
    step = jax.jit(repeat(follower(WIDTHS), EVERY))
    state = create(path_of(jnp.int32(0)), optax.sgd(1.0), jax.random.key(0), profiles=len(WIDTHS))
    states = []
    for _ in range(STEPS // EVERY):
        state, _ = step(state, {"x": jnp.zeros((EVERY, 1, 1))})
        states.append(state)
    return states


def save_all(snapshots):
    hook = post_hoc.snapshots_every(EVERY, snapshots, inner=EVERY)
    for state in followed():
        hook(int(state.step), state._replace(profiles=state.profiles[: len(post_hoc.STORED)]))
    snapshots.wait()


def error(got, want):
    """The largest, relative to the largest entry of each leaf."""
    leaves = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return float(np.max([jnp.abs(a - b).max() / jnp.abs(b).max() for a, b in leaves]))


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_are_what_they_say(width):
    """Measured: the standard deviation of the time that an average remembers, over the time."""
    average = followed()[-1].profiles[WIDTHS.index(width)]
    assert np.sqrt(average["square"] - average["time"] ** 2) == pytest.approx(width, rel=2e-3)


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94), (12**-0.5, 0.0)])
def test_exponents_are_the_papers(width, gamma):
    assert post_hoc.exponent(width) == pytest.approx(gamma, abs=0.01)


def test_the_first_update_copies_and_a_uniform_average_is_the_mean():
    state = create(path_of(jnp.int32(0)), optax.sgd(1.0), jax.random.key(0), profiles=2)
    step = jax.jit(follower((0.05, post_hoc.WIDEST)))
    for t in range(1, 6):
        state, _ = step(state, {"x": jnp.zeros((1, 1))})
        if t == 1:
            for profile in state.profiles:
                toy.assert_close(profile, path_of(jnp.int32(1)), 1e-6)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 5, *(path_of(jnp.int32(t)) for t in range(1, 6)))
    toy.assert_close(state.profiles[1], mean, 1e-5)


def test_stored_averages_are_their_own_mixture(snapshots):
    stored = [(t, width) for t in range(EVERY, STEPS + 1, EVERY) for width in post_hoc.STORED]
    for i in (7, len(stored) - 1):
        np.testing.assert_allclose(post_hoc.mixture(stored, stored[i]), np.eye(len(stored))[i], atol=1e-4)
    save_all(snapshots)
    for i, width in enumerate(post_hoc.STORED):
        got = post_hoc.reconstruct(snapshots, followed()[0].params, width)
        assert error(got, followed()[-1].profiles[i]) < 1e-6


@pytest.mark.parametrize("width", OTHERS)
def test_other_widths_agree_with_averages_tracked_all_along(snapshots, width):
    save_all(snapshots)
    shapes = jax.eval_shape(lambda: followed()[0].params)
    for state in (followed()[-1], followed()[len(followed()) // 2]):
        got = post_hoc.reconstruct(snapshots, shapes, width, int(state.step))
        assert error(got, state.profiles[WIDTHS.index(width)]) < 5e-4
    nearest = min(error(state.profiles[i], followed()[-1].profiles[WIDTHS.index(width)]) for i in range(2))
    assert nearest > 0.05  # neither of the stored ones would have done


def test_weights_sum_to_one():
    stored = [(t, width) for t in range(EVERY, STEPS + 1, EVERY) for width in post_hoc.STORED]
    for width in (0.03, 0.08, 0.15, 0.25):
        for end in (STEPS, STEPS - 30):
            assert post_hoc.mixture(stored, (end, width)).sum() == pytest.approx(1, abs=0.01)


@pytest.mark.long
def test_the_same_on_a_mesh_and_under_jit():
    """Averages lie as their parameters do, and are those of one device."""
    found = []
    for sizes in [(1, 1, 1), (1, 8, 1)]:
        problem, devices = Problem(DIT), grid(*sizes)
        state = mesh.place(devices, problem.state(profiles=2), SMALL)
        call = mesh.compile_step(problem.step(), devices, state, small=SMALL)
        for n in range(3):
            state, _ = call(state, mesh.put_batch(devices)(problem.batch(n)))
        for profile in state.profiles:
            assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, profile, state.params))
        found.append(toy.host(state.profiles))
    toy.assert_close(*found, 1e-5)


def test_a_resumed_run_has_the_same_snapshots(tmp_path):
    """Cut at 6 of 12, when the snapshot of 8 had been written already: that is no mistake, and nothing changes."""
    devices, fresh = (
        mesh.make_mesh(data=2, fsdp=-1),
        create(toy.params(), toy.optimizer(), jax.random.key(0), profiles=2),
    )
    step = mesh.compile_step(global_step(toy.make_update()()), devices, fresh, small=toy.SMALL)

    def run(folder, end):
        state = mesh.place(devices, fresh, toy.SMALL)
        checkpoints = Checkpoints(folder / "checkpoints")
        snapshots, data = Checkpoints(folder / "snapshots", keep=None), toy.Data()
        state = resume(checkpoints, state, data)
        keep = {"checkpoints": checkpoints, "checkpoint_every": 6}
        hooks = [post_hoc.snapshots_every(4, snapshots)]
        state = fit(step, state, data, steps=end, hooks=hooks, progress=False, **keep)
        checkpoints.close()
        snapshots.close()
        return state, snapshots.steps()

    whole, _ = run(tmp_path / "whole", 12)
    run(tmp_path / "cut", 6)
    (tmp_path / "whole" / "snapshots" / "8").rename(tmp_path / "cut" / "snapshots" / "8")
    cut, steps = run(tmp_path / "cut", 12)
    toy.assert_same(cut, whole)
    assert steps == [4, 8, 12]


def test_mistakes_are_one_line(snapshots):
    like = followed()[0].params
    with pytest.raises(UserError, match="holds no snapshots"):
        post_hoc.reconstruct(snapshots, like, 0.1)
    save_all(snapshots)
    with pytest.raises(UserError, match=r"sigma_rel=0.3: choose a width above 0 and up to 0.2887"):
        post_hoc.reconstruct(snapshots, like, 0.3)
    with pytest.raises(UserError, match="sigma_rel=0: "):
        post_hoc.exponent(0)
    with pytest.raises(UserError, match=r"step=2001: the snapshots in .* reach from 1 to 2000"):
        post_hoc.reconstruct(snapshots, like, 0.1, 2001)
    with pytest.raises(UserError, match=r"holds averages of widths 0.05, 0.1, not \(0.05, 0.2\)"):
        post_hoc.reconstruct(snapshots, like, 0.1, widths=(0.05, 0.2))


def test_one_step_of_many_can_be_read(snapshots):
    save_all(snapshots)
    assert snapshots.steps() == list(range(EVERY, STEPS + 1, EVERY))
    like = {"profiles": followed()[0].profiles[:2], "sigma_rel": jnp.zeros(2)}
    saved, _ = snapshots.restore(like, 3 * EVERY)
    toy.assert_same(saved["profiles"], followed()[2].profiles[:2])
    with pytest.raises(UserError, match=r"there is no checkpoint .*/151: choose from 50, 100"):
        snapshots.restore(like, 151)
    file = next(path for path in (snapshots.folder / "150").rglob("*") if path.is_file() and path.suffix != ".json")
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"150 is damaged \(.* is changed\)"):
        snapshots.restore(like, 150)

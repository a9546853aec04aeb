"""Trajectories: paths, returns and windows against loops that follow their definitions, and what must not leak."""

import pickle

import numpy as np
import pytest

from diffrl.data import trajectories
from diffrl.data.normalisers import cdf, gaussian, limits, normalise
from diffrl.data.pipeline import loader
from diffrl.data.trajectories import Paths, Transitions, goal_exits, paths, returns_to_go, seams, window_returns
from diffrl.data.windows import windows
from diffrl.errors import UserError

S, A = 3, 2


def transitions(rows=60, seed=0, ends=0.15):
    rng = np.random.default_rng(seed)
    return Transitions(
        rng.normal(size=(rows, S)).astype(np.float32),
        rng.normal(size=(rows, A)).astype(np.float32),
        rng.normal(size=rows).astype(np.float32),
        rng.random(rows) < ends / 2,
        rng.random(rows) < ends / 2,
    )


def path_rows(ends):
    """The rows of each path, by the definition."""
    found, current = [], []
    for row, end in enumerate(ends):
        current.append(row)
        if end or row == len(ends) - 1:
            found.append(current)
            current = []
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ends", [0.0, 0.1, 0.9])
def test_paths_end_where_marked(seed, ends):
    marked = np.random.default_rng(seed).random(40) < ends
    starts, lengths = paths(marked)
    assert [list(range(s, s + n)) for s, n in zip(starts, lengths, strict=True)] == path_rows(marked)


def test_seams_are_timeouts_after_which_one_is_elsewhere():
    xy = np.array([[0, 0], [1, 0], [1, 0], [2, 0], [7, 7], [7, 8]], np.float32)
    timeouts = np.array([False, True, False, True, False, True])  # a new target, a seam, the end
    np.testing.assert_array_equal(seams(xy, timeouts), [False, False, False, True, False, False])


def test_goal_exits_are_those_of_the_definition():
    goal = np.array([1.0, -1.0])
    xy = goal + np.random.default_rng(0).uniform(-0.6, 0.6, (200, 2))
    there = [np.hypot(*(p - goal)) < 0.5 for p in xy]
    expected = [t < 199 and there[t] and not there[t + 1] for t in range(200)]
    assert 10 < sum(expected) < 190
    np.testing.assert_array_equal(goal_exits(xy, goal), expected)
    np.testing.assert_array_equal(goal_exits(xy, np.tile(goal, (200, 1))), expected)
    assert not goal_exits(xy, goal, radius=10).any()  # it stays to the end


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("horizon", [1, 2, 3, 7, 8, 1000])
def test_returns_are_direct_sums(discount, horizon):
    for seed, ends in ((0, 0.1), (1, 0.0), (2, 0.6)):
        t = transitions(50, seed, ends)
        marked = t.terminals | t.timeouts
        expected, to_go = np.zeros(50), np.zeros(50)
        for rows in path_rows(marked):
            for i, row in enumerate(rows):
                weighted = [discount**k * t.rewards[later] for k, later in enumerate(rows[i:])]
                expected[row], to_go[row] = sum(weighted[:horizon]), sum(weighted)
        found = window_returns(t.rewards, paths(marked), horizon, discount)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(returns_to_go(t.rewards, paths(marked), discount), to_go, rtol=1e-6, atol=1e-6)


def test_returns_do_not_cancel():
    """A huge reward long ago leaves no trace in the windows after it, as it would in differences of cumulative sums."""
    rewards = np.full(3000, 1e-3, np.float32)
    rewards[0] = 1e15
    one = paths(np.zeros(3000, bool))
    np.testing.assert_allclose(window_returns(rewards, one, 100, 1.0)[1:2901], 0.1, rtol=1e-6)
    exact = 1e-3 * (1 - 0.99**100) / (1 - 0.99)
    np.testing.assert_allclose(window_returns(rewards, one, 100, 0.99)[1:2901], exact, rtol=1e-6)
    np.testing.assert_allclose(returns_to_go(rewards, one, 1.0)[1:], np.float32(1e-3) * np.arange(2999, 0, -1.0), 1e-6)


def test_rows_outside_the_paths_have_no_return_and_lend_none():
    rewards = np.array([1, 2, np.nan, 4, 5, np.nan], np.float32)
    some = Paths(np.array([0, 3]), np.array([2, 2]))
    np.testing.assert_array_equal(returns_to_go(rewards, some, 1.0), [3, 2, 0, 9, 5, 0])
    np.testing.assert_array_equal(window_returns(rewards, some, 1, 1.0), [1, 2, 0, 4, 5, 0])


def make(t, horizon, pad, which=None, **more):
    which = paths(t.terminals | t.timeouts) if which is None else which
    kinds = {"observations": limits(X.observations), "actions": gaussian(X.actions)}
    return windows(t, which, horizon, pad=pad, name="set", **kinds, **more)


X = transitions(100, seed=9)


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("horizon", [1, 4, 9])
def test_windows_are_those_of_the_definition(pad, horizon):
    returns = np.arange(100, dtype=np.float32)
    source = make(X, horizon, pad, returns=returns)
    expected = []
    for rows in path_rows(X.terminals | X.timeouts):
        last = len(rows) if pad else len(rows) - horizon + 1
        expected += [rows[i : i + horizon] for i in range(last)]
    assert source.length == len(expected)
    assert source.shape == (horizon, A + S)
    assert source.in_memory
    order = np.random.default_rng(0).permutation(source.length)
    batch = source.fetch(order)
    assert {key: (value.dtype, len(value)) for key, value in batch.items()} == {
        key: (np.dtype(np.float32), source.length) for key in ("x", "mask", "returns")
    }
    actions, observations = gaussian(X.actions), limits(X.observations)
    for i, index in enumerate(order):
        rows, inside = expected[index], len(expected[index])
        np.testing.assert_array_equal(batch["mask"][i], np.arange(horizon) < inside)
        np.testing.assert_array_equal(batch["x"][i, :inside, :A], normalise(actions, X.actions[rows]))
        np.testing.assert_array_equal(batch["x"][i, :inside, A:], normalise(observations, X.observations[rows]))
        assert (batch["x"][i, inside:] == 0).all()
        assert batch["returns"][i] == returns[rows[0]]


@pytest.mark.parametrize("pad", [True, False])
def test_nothing_leaks_from_behind_a_path(pad):
    ends = X.terminals | X.timeouts
    whole = paths(ends)
    kept, held = (Paths(whole.starts[k::2], whole.lengths[k::2]) for k in (0, 1))
    before = make(X, 6, pad, kept)
    spoilt = Transitions(*(field.copy() for field in X))
    for start, length in zip(*held, strict=True):
        spoilt.observations[start : start + length] = np.nan
        spoilt.actions[start : start + length] = np.inf
    after = make(spoilt, 6, pad, kept)
    everything = np.arange(before.length)
    for key, value in before.fetch(everything).items():
        assert value.tobytes() == after.fetch(everything)[key].tobytes()


def test_through_the_loader_and_into_workers():
    source = make(X, 5, True, returns=returns_to_go(X.rewards, paths(X.terminals | X.timeouts), 0.9))
    batches = list(loader(source, 10, epochs=1))
    assert len(batches) == 10
    again = pickle.loads(pickle.dumps(source))
    plain = again.fetch(np.arange(100))
    assert set(plain) == {"x", "mask", "returns"}
    for key, value in plain.items():
        rows = np.concatenate([batch[key] for batch in batches]).reshape(100, -1)
        assert rows.dtype == np.float32
        assert sorted(map(tuple, rows)) == sorted(map(tuple, value.reshape(100, -1)))


def test_blocks_are_seamless(monkeypatch):
    whole = windows(X, paths(X.timeouts), 3, observations=cdf(X.observations), actions=limits(X.actions), pad=True)
    monkeypatch.setattr("diffrl.data.windows.BLOCK", 7)
    parts = windows(X, paths(X.timeouts), 3, observations=cdf(X.observations), actions=limits(X.actions), pad=True)
    np.testing.assert_array_equal(whole.fetch(np.arange(100))["x"], parts.fetch(np.arange(100))["x"])


def test_save_and_load(tmp_path):
    path = tmp_path / "new" / "maze.data"
    trajectories.save(path, X, environment="maze", seed=3, noise=np.float32(0.5))
    found, facts = trajectories.load(path)
    for before, after in zip(X, found, strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)
    assert facts == {"environment": "maze", "seed": 3, "noise": 0.5}
    assert [file.name for file in path.parent.iterdir()] == ["maze.data"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "maze.npz"
    trajectories.save(path, X, seed=1)

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match="No space left on device; choose another place"):
        trajectories.save(path, X, seed=2)
    assert trajectories.load(path)[1] == {"seed": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["maze.npz"]


BAD = X.observations.copy()
BAD[[7, 3], 1] = np.nan
FAR = X.actions.copy()
FAR[5] = np.inf


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Transitions(*(field[:0] for field in X)), "set holds no transitions"),
        (X._replace(actions=X.actions[:-1]), "set has 99 actions but 100 rewards"),
        (X._replace(timeouts=X.timeouts[:4]), "set has 4 timeouts but 100 rewards"),
        (X._replace(observations=X.rewards), r"set has observations of shape \(100,\): store \[N, D\]"),
        (X._replace(observations=BAD), r"set has observations in row 3 that are not finite \(.*nan.*\)"),
        (X._replace(observations=BAD, actions=FAR), "set has observations in row 3"),
        (X._replace(actions=FAR), "set has actions in row 5"),
    ],
)
def test_transitions_that_are_refused(wrong, message):
    with pytest.raises(UserError, match=message) as error:
        trajectories.check(wrong, "set")
    assert "\n" not in str(error.value)


def test_files_that_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        trajectories.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(UserError, match="it is no archive"):
        trajectories.load(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", observations=X.observations, images=np.zeros(3))
    with pytest.raises(UserError, match="has no 'actions', only observations, images"):
        trajectories.load(tmp_path / "other.npz")
    words = {**X._asdict(), "rewards": np.array(["good"] * 100)}
    with pytest.raises(UserError, match="rewards of type <U4: store numbers"):
        trajectories.from_fields(words, "set")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: make(X, 400, False),
            r"set has no window of 400 steps, as its longest path has \d+: lower the horizon",
        ),
        (lambda: make(X, 0, True), "windows of 0 steps"),
        (lambda: make(X, 4, True, Paths(*np.zeros((2, 0), int))), "keep at least one path"),
        (lambda: make(X, 4, True, returns=np.zeros(3)), r"set has 100 steps but returns of shape \(3,\)"),
        (lambda: paths(np.zeros(0, bool)), "no paths in 0 transitions"),
        (lambda: window_returns(X.rewards, paths(X.timeouts), 0, 0.9), "a return over 0 steps"),
        (lambda: returns_to_go(X.rewards, paths(X.timeouts), 1.5), "discount 1.5 must lie between 0 and 1"),
    ],
)
def test_what_cannot_be_cut(call, message):
    with pytest.raises(UserError, match=message):
        call()

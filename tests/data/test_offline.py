"""Recorded sets: files of each kind, written here as their makers write them, and told apart by content."""

import sys

import numpy as np
import pytest

from diffrl.data import trajectories
from diffrl.data.offline import read, read_goals
from diffrl.errors import UserError

h5py = pytest.importorskip("h5py")

N, S, A = 12, 4, 2
RNG = np.random.default_rng(0)
D4RL = {
    "observations": RNG.normal(size=(N, S)).astype(np.float32),
    "actions": RNG.normal(size=(N, A)),
    "rewards": RNG.normal(size=(N, 1)),
    "terminals": np.isin(np.arange(N), [4]),
    "timeouts": np.isin(np.arange(N), [8]),
    "infos/goal": RNG.normal(size=(N, 2)),
    "infos/qpos": RNG.normal(size=(N, 2)),
}


def write(path, arrays):
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value
    return path


def without(*keys):
    return {key: value for key, value in D4RL.items() if key not in keys}


def test_d4rl(tmp_path):
    path = write(tmp_path / "set.bin", D4RL)  # whatever it is called
    found = read(path)
    np.testing.assert_array_equal(found.observations, D4RL["observations"])
    np.testing.assert_array_equal(found.actions, D4RL["actions"].astype(np.float32))
    np.testing.assert_array_equal(found.rewards, D4RL["rewards"][:, 0].astype(np.float32))
    np.testing.assert_array_equal(np.flatnonzero(found.terminals), [4])
    np.testing.assert_array_equal(np.flatnonzero(found.timeouts), [8, N - 1])
    assert [field.dtype for field in found] == [np.float32] * 3 + [bool] * 2
    np.testing.assert_array_equal(read_goals(path), D4RL["infos/goal"].astype(np.float32))


def test_d4rl_without_timeouts(tmp_path):
    path = write(tmp_path / "set.hdf5", without("timeouts"))
    np.testing.assert_array_equal(np.flatnonzero(read(path).timeouts), [N - 1])
    # Row 4 is terminal: the count of three begins anew after it.
    np.testing.assert_array_equal(np.flatnonzero(read(path, episode_steps=3).timeouts), [2, 7, 10, N - 1])
    # An episode that terminates in its last step did not run out of time as well.
    np.testing.assert_array_equal(np.flatnonzero(read(path, episode_steps=5).timeouts), [9, N - 1])


LENGTHS = {**dict.fromkeys(range(12), 3), 10: 5}


def minari(dictionary=True):
    """Episodes whose observations tell number and step; HDF5 lists the tenth before the second."""
    arrays = {}
    for k, steps in LENGTHS.items():
        seen = np.stack([np.full(steps + 1, k), np.arange(steps + 1)], axis=1).astype(np.float64)
        group = f"episode_{k}"
        if dictionary:
            arrays |= {
                f"{group}/observations/observation": seen,
                f"{group}/observations/achieved_goal": -seen,
                f"{group}/observations/desired_goal": seen + 0.5,
            }
        else:
            arrays[f"{group}/observations"] = seen
        arrays |= {
            f"{group}/actions": 10 * seen[:-1],
            f"{group}/rewards": seen[:-1, 1],
            f"{group}/terminations": np.arange(steps) == (steps - 1 if k % 2 else -1),
            f"{group}/truncations": np.zeros(steps, bool),
            f"{group}/infos/success": np.zeros(steps + 1, bool),
        }
    return arrays


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("inside", ["main_data.hdf5", "data/main_data.hdf5"])
def test_minari(tmp_path, dictionary, inside):
    (tmp_path / inside).parent.mkdir(exist_ok=True)
    write(tmp_path / inside, minari(dictionary))
    found = read(tmp_path)
    expected = np.array([(k, t) for k in range(12) for t in range(LENGTHS[k])], np.float32)
    np.testing.assert_array_equal(found.observations, expected)
    np.testing.assert_array_equal(found.actions, 10 * expected)
    np.testing.assert_array_equal(found.rewards, expected[:, 1])
    last = expected[:, 1] == [LENGTHS[int(k)] - 1 for k in expected[:, 0]]
    np.testing.assert_array_equal(found.terminals, last & (expected[:, 0] % 2 == 1))
    np.testing.assert_array_equal(found.timeouts, last & (expected[:, 0] % 2 == 0))
    cut = trajectories.paths(found.terminals | found.timeouts)
    assert cut.lengths.tolist() == list(LENGTHS.values())
    if dictionary:
        np.testing.assert_array_equal(read_goals(tmp_path), expected + 0.5)
        both = read(tmp_path, observation=("achieved_goal", "observation")).observations
        np.testing.assert_array_equal(both, np.concatenate([-expected, expected], axis=1))


def test_our_own(tmp_path):
    fields = {key: value for key, value in D4RL.items() if "/" not in key}
    before = trajectories.from_fields(fields, "set")
    trajectories.save(tmp_path / "set", before)
    for one, other in zip(before, read(tmp_path / "set"), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(UserError, match="has no goals"):
        read_goals(tmp_path / "set")


def long_minari():
    arrays = minari()
    return {**arrays, "episode_2/rewards": np.zeros(4)}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (without("rewards"), r"has no array 'rewards', only actions, infos, observations, terminals, timeouts"),
        (without("observations"), "has no array 'observations'"),
        ({"images": np.zeros(3)}, "has no array 'observations', only images"),
        ({**D4RL, "actions": D4RL["actions"][:3]}, "has 3 actions but 12 rewards"),
        ({**D4RL, "rewards": np.full(N, np.nan)}, "has rewards in row 0 that are not finite"),
        ({key: value[:0] for key, value in D4RL.items()}, "holds no transitions"),
        ({**D4RL, "observations": np.zeros((N, S), "S3")}, r"observations of type \|S3: store numbers"),
        (long_minari(), "episode_2 has 4 observations/observation but 4 rewards"),
        (
            {k: v for k, v in minari().items() if k != "episode_3/truncations"},
            "episode_3 has no array 'truncations', only actions",
        ),
        (
            {k: v for k, v in minari().items() if k != "episode_3/observations/observation"},
            "episode_3 has no array 'observations/observation', only achieved_goal, desired_goal",
        ),
        ({**minari(), "episode_1/actions": np.zeros((2, 2))}, "episode_1 has 2 actions but 3 rewards"),
    ],
)
def test_files_that_are_refused(tmp_path, arrays, message):
    with pytest.raises(UserError, match=message) as error:
        read(write(tmp_path / "set.hdf5", arrays))
    assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "none.hdf5")
    with pytest.raises(UserError, match=r"a folder without main_data\.hdf5"):
        read(tmp_path)
    (tmp_path / "set.hdf5").write_text("text")
    with pytest.raises(UserError, match=r"neither HDF5 nor \.npz"):
        read(tmp_path / "set.hdf5")
    whole = write(tmp_path / "whole.hdf5", D4RL)
    (tmp_path / "cut.hdf5").write_bytes(whole.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"cannot read .*; is it whole"):
        read(tmp_path / "cut.hdf5")
    with pytest.raises(UserError, match="has no array 'infos/goal', only qpos"):
        read_goals(write(tmp_path / "aimless.hdf5", without("infos/goal")))
    np.savez(tmp_path / "images.npz", x=np.zeros(3))
    with pytest.raises(UserError, match="has no 'observations', only x"):
        read(tmp_path / "images.npz")


def test_without_h5py(tmp_path, monkeypatch):
    path = write(tmp_path / "set.hdf5", D4RL)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"h5py is not installed: pip install -e '\.\[offline\]'"):
        read(path)

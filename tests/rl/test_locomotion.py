"""Walkers on the host: actors against PyTorch, episodes against Gymnasium step for step, and what made sets hold."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.recipes import tasks
from diffrl.rl import experts, locomotion

pytest.importorskip("gymnasium", reason="gymnasium, of the [envs] extra, has the walkers")
pytest.importorskip("mujoco", reason="mujoco, of the [envs] extra, moves the walkers")
pytest.importorskip("imageio", reason="imageio, of gymnasium's own [mujoco] extra, is imported with the walkers")


@pytest.fixture(scope="module")
def archive(data_dir):
    path = data_dir / "rl" / "sb3_zoo_sac_tqc_actors.npz"
    if not path.is_file():
        pytest.skip(f"real data: {path} is absent")
    return path


def weights(state=5, act=2, width=16, seed=0, prefix="sac-Hopper-v3/"):
    """An archive's arrays of one actor, with log-std's far beyond their bounds."""
    rng = np.random.default_rng(seed)
    shapes = {"latent_pi.0": (width, state), "latent_pi.2": (width, width), "mu": (act, width), "log_std": (act, width)}
    arrays = {}
    for name, shape in shapes.items():
        scale = 20.0 if name == "log_std" else 1.0
        arrays[f"{prefix}actor.{name}.weight"] = (scale * rng.normal(size=shape) / shape[1] ** 0.5).astype(np.float32)
        arrays[f"{prefix}actor.{name}.bias"] = rng.normal(size=shape[0]).astype(np.float32)
    return arrays


def still(obs):
    return np.zeros((len(obs), 3), np.float32)


def paths(made):
    """(start, stop) of each episode."""
    stops = np.flatnonzero(made.terminals | made.timeouts) + 1
    return list(zip([0, *stops[:-1]], stops, strict=True))


@pytest.mark.oracle
def test_an_actor_is_what_pytorch_makes_of_its_weights(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch, of the [oracles] extra, is the reference")
    arrays = weights()
    np.savez(tmp_path / "a.npz", **arrays)
    actor = experts.read(tmp_path / "a.npz", "hopper", -2.0, 3.0)["sac"]

    def linear(name, inputs, outputs):
        layer = torch.nn.Linear(inputs, outputs)
        names = {key: f"sac-Hopper-v3/actor.{name}.{key}" for key in ("weight", "bias")}
        layer.load_state_dict({key: torch.tensor(arrays[full]) for key, full in names.items()})
        return layer

    relu = torch.nn.ReLU()
    latent = torch.nn.Sequential(linear("latent_pi.0", 5, 16), relu, linear("latent_pi.2", 16, 16), relu)
    obs = np.random.default_rng(1).normal(size=(64, 5)).astype(np.float32)
    with torch.no_grad():
        h = latent(torch.tensor(obs))
        mu, log_std = linear("mu", 16, 2)(h), linear("log_std", 16, 2)(h).clamp(-20, 2)
        action = 0.5 * (torch.tanh(mu) + 1) * 5 - 2
    assert log_std.min() == -20
    assert log_std.max() == 2
    for ours, theirs in zip((*actor.gaussian(obs), actor.mean(obs)), (mu, log_std, action), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)


def test_actors_are_found_by_their_world(tmp_path):
    arrays = {**weights(), **weights(prefix="tqc-Hopper-v3/", seed=1), **weights(prefix="sac-Walker2d-v3/")}
    path = tmp_path / "a.npz"
    np.savez(path, **arrays, **{"sac-Pendulum-v1/actor.log_std": np.zeros((64, 1))})
    assert experts.read(path, "Hopper").keys() == {"sac", "tqc"}
    assert experts.read(path, "walker2d").keys() == {"sac"}
    with pytest.raises(UserError, match="no actor for 'hoper': did you mean 'hopper'"):
        experts.read(path, "hoper")
    with pytest.raises(UserError, match="no actor for 'pendulum': choose from hopper, walker2d"):
        experts.read(path, "pendulum")
    with pytest.raises(UserError, match=r"no such file: .*b\.npz; point at"):
        experts.read(tmp_path / "b.npz", "hopper")
    (tmp_path / "c.npz").write_text("<html>")
    with pytest.raises(UserError, match="cannot read actors from"):
        experts.read(tmp_path / "c.npz", "hopper")
    with pytest.raises(UserError, match="no TQC actor for walker2d, only sac"):
        locomotion.made("walker2d", "expert", path, 10)


def test_rows_are_what_gymnasium_does_with_the_actions():
    """Replayed from each episode's first state, the actions give the rows, and falls are terminal and nothing else."""
    import gymnasium

    made = locomotion.roll_out("hopper", still, 700, noise=0.7, seed=3, side_by_side=4, limit=150)
    env = gymnasium.make("Hopper-v5").unwrapped
    assert made.goals.shape == (700, 0)
    assert not (made.terminals & made.timeouts).any()
    assert made.terminals.sum() >= 2
    episodes = paths(made)
    assert episodes[-1][1] == 700
    for number, (start, stop) in enumerate(episodes):
        obs, _ = env.reset(seed=int(np.random.default_rng([3, number]).integers(2**31)))
        for row in range(start, stop):
            np.testing.assert_allclose(made.observations[row], obs, rtol=1e-6)
            obs, reward, fell, _, _ = env.step(made.actions[row])
            np.testing.assert_allclose(made.rewards[row], reward, rtol=1e-6)
            assert made.terminals[row] == fell
        assert fell or stop == 700 or stop - start == 150
    assert np.abs(made.actions).max() == 1


def test_a_cut_is_a_timeout():
    made = locomotion.roll_out("halfcheetah", lambda obs: np.zeros((len(obs), 6)), 50, limit=20, side_by_side=2)
    assert np.flatnonzero(made.timeouts).tolist() == [19, 39, 49]
    assert not made.terminals.any()
    assert (made.actions == 0).all()
    ends = [made.observations[stop - 1] for _, stop in paths(made)[:2]]
    assert np.abs(ends[0] - ends[1]).max() > 1e-4  # each episode begins in a state of its own


def test_a_seed_makes_one_set():
    first, again, other = (locomotion.roll_out("hopper", still, 300, (0.1, 0.5), seed, 3, 100) for seed in (0, 0, 1))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(first.actions, other.actions)
    alone = locomotion.roll_out("hopper", still, 300, (0.1, 0.5), 0, 1, 100)
    for one, two in zip(first, alone, strict=True):  # nor do neighbours matter to a policy that ignores them
        np.testing.assert_array_equal(one, two)


def test_each_episode_draws_a_level_of_noise():
    made = locomotion.roll_out("halfcheetah", lambda obs: np.zeros((len(obs), 6)), 1200, (0.0, 0.1, 0.3), limit=30)
    spread = np.array([made.actions[start:stop].std() for start, stop in paths(made)])
    levels = np.array([0.0, 0.1, 0.3])
    nearest = np.abs(spread[:, None] - levels).argmin(1)
    np.testing.assert_allclose(spread, levels[nearest], atol=0.03)
    assert set(nearest) == {0, 1, 2}


def test_closed_loops_stop_where_episodes_end():
    seen = []

    def act(obs, alive, t):
        seen.append((obs, alive, t))
        actions = np.where(alive[:, None], still(obs), np.nan)  # what ended episodes are given does not matter
        actions[0] += 1.0
        return actions

    returns, lengths = locomotion.run("hopper", act, 3, seed=5, limit=400)
    assert [t for *_, t in seen] == list(range(max(lengths)))
    np.testing.assert_array_equal(np.sum([alive for _, alive, _ in seen], axis=0), lengths)
    assert len(set(lengths)) > 1
    made = locomotion.roll_out("hopper", still, 1000, seed=5, side_by_side=3, limit=400)
    for number, (start, stop) in enumerate(paths(made)[1:3], 1):
        assert stop - start == lengths[number]
        np.testing.assert_allclose(made.rewards[start:stop].sum(), returns[number], rtol=1e-5)
        ours = [obs[number] for obs, alive, _ in seen if alive[number]]
        np.testing.assert_array_equal(ours, made.observations[start:stop])
    assert lengths[0] < lengths[1]  # a push knocks over what would have stood longer


def score(world, returns):
    known = locomotion.named(world)
    return tasks.normalised(SimpleNamespace(reference=(known.random, known.expert)), returns)


def test_scores_are_d4rls():
    np.testing.assert_allclose(score("hopper", [-20.272305, 3234.3]), [0, 100], atol=1e-4)
    np.testing.assert_allclose(score("walker2d", np.array([2852.0])), 62.09, atol=0.01)


def test_sets_are_labelled_as_ours():
    for world, quality in locomotion.QUALITIES:
        facts = locomotion.facts(world, quality, 0)
        assert facts["name"] == f"ours-{world}-{quality}"
        assert "not D4RL's" in facts["origin"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: locomotion.run("hoper", None, 1), "did you mean 'hopper'"),
        (lambda: locomotion.made("hopper", "medium-replay", "", 1), "did you mean 'medium_replay'"),
        (lambda: locomotion.facts("ant", "medium", 0), "choose from halfcheetah, hopper, walker2d"),
        (lambda: locomotion.made("hopper", "expert", "none.npz", 1), "no such file: none.npz"),
        (lambda: locomotion.roll_out("hopper", still, 0), "0 transitions of episodes of 1000 steps"),
        (lambda: locomotion.run("hopper", still, 0), "0 episodes of 1000 steps"),
        (lambda: locomotion.roll_out("hopper", lambda obs: still(obs) * np.nan, 5), "not finite"),
        (lambda: locomotion.roll_out("hopper", lambda obs: still(obs)[0], 5), r"given actions \(3,\)"),
    ],
)
def test_mistakes_are_told(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_an_absent_simulator_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(UserError, match=r"mujoco is not installed: pip install -e '\.\[envs\]'"):
        locomotion.run("hopper", still, 1)


def test_the_expert_cheetah_runs_as_it_was_measured(archive):
    """11.7k to 12.2k is what these weights were measured to earn."""
    made = locomotion.made("halfcheetah", "expert", archive, 2000)
    assert np.flatnonzero(made.timeouts).tolist() == [999, 1999]
    returns = made.rewards.reshape(2, 1000).sum(1)
    assert ((returns > 11_400) & (returns < 12_500)).all(), returns


@pytest.mark.slow
@pytest.mark.parametrize(("world", "low", "high"), [("hopper", 2600, 3700), ("walker2d", 4300, 4700)])
def test_experts_walk_as_they_were_measured(archive, world, low, high):
    actor = experts.read(archive, world)["tqc"]
    returns, _ = locomotion.run(world, lambda obs, alive, t: actor.mean(obs), 10)
    assert low < returns.mean() < high, returns


@pytest.mark.slow
@pytest.mark.parametrize(("world", "quality"), [key for key in locomotion.QUALITIES if key[1] != "expert"])
def test_sets_score_as_the_table_says(archive, world, quality):
    made = locomotion.made(world, quality, archive, 24_000, seed=1)
    scores = [score(world, made.rewards[a:b].sum()) for a, b in paths(made)]
    tolerance = 4 * np.std(scores) / len(scores) ** 0.5
    assert abs(np.mean(scores) - locomotion.QUALITIES[world, quality][1]) < tolerance, np.mean(scores)

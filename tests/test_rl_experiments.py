"""The experiments of reinforcement learning as a user runs them, small: pictures, resumed runs, one-line mistakes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from diffrl import config as config_lib
from experiments import a2c, a3c, dqn, ppo, reinforce, sac, trpo_vs_ppo

FEW = ["--config.run.seeds=2", "--config.run.episodes=2", "--config.run.final_episodes=2", "--config.run.evaluations=2"]
ONE = ["--config.mesh.data=1", "--config.mesh.fsdp=8", "--config.world.num=8"]
TINY = ["--config.net.policy=(8,)", "--config.net.value=(8,)"]


def run(experiment, workdir, *flags):
    config_lib.run(experiment.main, experiment.PRESETS, argv=[f"--workdir={workdir}", *flags])


def names(folder):
    return {path.name for path in folder.iterdir()}


PPO = [*FEW, *ONE, *TINY, "--config.run.steps=1024", "--config.ppo.unroll=16", "--config.ppo.epochs=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ppo")
    run(ppo, workdir, *PPO, "--config.run.keep=9", "--config.ppo.normalise_obs", "--config.ppo.normalise_rewards")
    return workdir


def test_a_run_leaves_what_a_user_looks_for(trained):
    assert {"config.json", "metrics.jsonl", "curve.png", "results.json", "video.gif", "checkpoints"} <= names(trained)
    found = json.loads((trained / "results.json").read_text())
    assert found["env_steps"] == 1024
    assert len(found["returns"]) == 2
    assert all(5 < value < 501 for value in found["returns"])
    with Image.open(trained / "video.gif") as video:
        assert video.n_frames > 5
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["env_steps"] for row in rows if "eval_return/1" in row] == [0, 512, 1024]
    assert {"loss", "kl", "entropy", "explained_variance", "episode_return", "samples_per_s"} <= set(rows[2])


def test_a_resumed_run_is_the_same_run(trained, tmp_path):
    """Taken up from its middle, with everything after that lost, it ends in the same numbers."""
    shutil.copytree(trained, tmp_path / "copy")
    steps = sorted(int(path.name) for path in (tmp_path / "copy" / "checkpoints").iterdir() if path.name.isdigit())
    assert steps == [4, 8]
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "8")
    before = (trained / "metrics.jsonl").read_text().splitlines()
    run(ppo, tmp_path / "copy")
    after = (tmp_path / "copy" / "metrics.jsonl").read_text().splitlines()
    assert (tmp_path / "copy" / "results.json").read_text() == (trained / "results.json").read_text()
    timed = ("steps_per_s", "samples_per_s")
    for a, b in zip(before, after, strict=True):
        a, b = ({k: v for k, v in json.loads(line).items() if k not in timed} for line in (a, b))
        assert a == b


@pytest.mark.long
def test_a2c_dqn_and_sac(tmp_path):
    run(a2c, tmp_path / "a2c", *FEW, *ONE, *TINY, "--config.run.steps=1024", "--config.world.name=acrobot")
    assert json.loads((tmp_path / "a2c" / "results.json").read_text())["returns"] == pytest.approx(
        [-500, -500], abs=500
    )
    small = ["--config.run.steps=512", "--config.dqn.start=64", "--config.dqn.updates=1", "--config.dqn.batch=16"]
    run(
        dqn,
        tmp_path / "dqn",
        *FEW,
        *ONE,
        "--config.net.policy=(8,)",
        *small,
        "--config.dqn.prioritised",
        "--config.dqn.buffer=256",
        "--config.dqn.groups=8",
    )
    assert {"curve.png", "results.json", "video.gif"} <= names(tmp_path / "dqn")
    small = [flag.replace("dqn", "sac") for flag in small]
    run(sac, tmp_path / "sac", *FEW, *ONE, *TINY, *small, "--config.sac.groups=8", "--config.sac.buffer=256")
    rows = [json.loads(line) for line in (tmp_path / "sac" / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["alpha"] > rows[-1]["alpha"] > 0  # there is more chance than asked for
    fixed = ["--noconfig.sac.adapt", "--config.sac.alpha=0.2", "--config.run.video=False"]
    run(sac, tmp_path / "fixed", *FEW, *ONE, *TINY, *small, *fixed, "--config.sac.groups=8", "--config.sac.buffer=256")
    rows = [json.loads(line) for line in (tmp_path / "fixed" / "metrics.jsonl").read_text().splitlines()]
    assert {round(row["alpha"], 5) for row in rows if "alpha" in row} == {0.2}


@pytest.mark.long
def test_contests_end_with_one_plot_and_one_table(tmp_path):
    flags = [*FEW, *ONE, *TINY, "--config.run.steps=512", "--config.run.video=False"]
    run(reinforce, tmp_path / "r", *flags, "--config.reinforce.unroll=32")
    assert {"curves.png", "table.md", "baseline", "plain"} <= names(tmp_path / "r")
    own = ["--config.contest.worlds=('pendulum',)", "--config.contest.unroll=16", "--config.contest.epochs=1"]
    run(trpo_vs_ppo, tmp_path / "t", *flags, *own)
    table = (tmp_path / "t" / "table.md").read_text()
    assert "pendulum/trpo" in table
    assert "pendulum/ppo" in table


def test_a3c_goes_on(tmp_path):
    flags = ["--config.run.episodes=2", "--config.run.final_episodes=2", "--config.run.evaluations=2", *TINY]
    run(a3c, tmp_path, *flags, "--config.run.steps=600", "--config.run.video=False")
    assert {"curve.png", "staleness.png", "results.json"} <= names(tmp_path)
    first = json.loads((tmp_path / "results.json").read_text())
    assert 600 <= first["env_steps"] < 800
    run(a3c, tmp_path, "--config.run.steps=1200", "--accept_changes")
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["env_steps"] >= 1200
    run(a3c, tmp_path)  # has nothing to do, and forgets nothing
    assert json.loads((tmp_path / "results.json").read_text()) == found


@pytest.mark.parametrize(
    ("experiment", "flags", "words"),
    [
        (ppo, ["--config.world.name=cartpol"], "did you mean 'cartpole'?"),
        (ppo, ["--config.world.num=12", "--config.mesh.data=8"], "12 worlds cannot be split over 8 devices"),
        (ppo, ["--config.run.steps=10", *ONE], "choose at least 1024"),
        (ppo, ["--config.net.activation=rel"], "did you mean 'relu'?"),
        (dqn, ["--config.world.name=pendulum", *ONE], "takes vectors"),
        (dqn, ["--config.dqn.groups=3", *ONE], "groups=3 does not divide 8 worlds"),
        (dqn, ["--config.dqn.groups=4", *ONE, *FEW], "4 groups of worlds cannot be split over 8 devices"),
        (sac, ["--config.world.name=cartpole", *ONE], "2 numbered actions: use DQN"),
        (sac, ["--noconfig.net.squash", *ONE], "says nothing of the algorithm"),
        (sac, ["--config.sac.groups=3", *ONE], "--config.sac.groups=3 does not divide 8 worlds"),
        (
            sac,
            ["--config.sac.buffer=100", "--config.sac.n_step=50", *ONE],
            "sac.buffer=100 keeps 12 steps of each of 8",
        ),
        (dqn, ["--config.dqn.batch=10", "--config.dqn.groups=4", *ONE], "dqn.batch=10 is no multiple of"),
        (trpo_vs_ppo, ["--config.contest.worlds=()"], "contest.worlds=() is empty"),
        (trpo_vs_ppo, ["--config.world.name=pendulum"], "the worlds are those of --config.contest.worlds"),
        (trpo_vs_ppo, ["--config.contest.worlds=('cartpole',)", "--config.net.squash"], "nothing of numbered actions"),
        (reinforce, ["--config.net.squash"], "net.squash=True says nothing of numbered actions"),
        (trpo_vs_ppo, ["--config.contest.agents=('tpo',)"], "did you mean 'trpo'?"),
        (dqn, ["--config.net.value=(8,)", *ONE], "net.value=(8,) says nothing of the algorithm: leave it at (64, 64)"),
        (dqn, ["--config.dqn.dueling"], "only pictures' networks duel"),
        (ppo, ["--config.net.squash"], "says nothing of numbered actions"),
        (a3c, ["--config.run.seeds=3"], "threads run one seed"),
        (a3c, ["--config.world.num=3"], "a thread has one world"),
        (a3c, ["--config.a3c.learning_rate=1e30", *TINY], "the parameters are not finite"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, experiment, flags, words):
    with pytest.raises(SystemExit):
        run(experiment, tmp_path, *flags)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert words in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "preset", "threshold"),
    [
        (ppo, "cartpole", 475),
        (dqn, "cartpole", 475),
        (a2c, "cartpole", 475),
        (ppo, "acrobot", -100),
        (ppo, "pendulum", -200),
        (sac, "pendulum", -200),
        (ppo, "cartpole_balance", 950),
    ],
)
def test_published_thresholds(experiment, preset, threshold, tmp_path):
    """Of Gymnasium over five seeds, one for Playground's: whole experiments, half a minute each (four for the last)."""
    if preset == "cartpole_balance":
        pytest.importorskip("mujoco_playground")
    named = [f"--preset={preset}"] if preset in experiment.PRESETS else []
    # On their own: the many devices that tests have would each do the same work here.
    command = [sys.executable, "-m", experiment.__name__, f"--workdir={tmp_path}", *named, "--config.run.video=False"]
    alone = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run(command, check=True, env=alone)
    assert json.loads((tmp_path / "results.json").read_text())["interquartile_mean"] >= threshold

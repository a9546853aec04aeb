"""The tabular experiment as a user runs it, small."""

import json

import numpy as np
import pytest

from diffrl import config as config_lib
from experiments import tabular

SMALL = ["--config.seeds=3", "--config.steps=3000", "--config.worlds=('cliff',)", "--config.limit=100"]


def run(workdir, *flags):
    config_lib.run(tabular.main, tabular.PRESETS, argv=[f"--workdir={workdir}", *SMALL, *flags])


@pytest.mark.long
def test_ends_with_pictures_and_a_table(tmp_path, capsys):
    run(tmp_path, "--config.learners=('Q-learning','Monte Carlo')")
    assert {"optimal.png", "learning.png", "exploration.png", "table.md"} <= {path.name for path in tmp_path.iterdir()}
    found = json.loads((tmp_path / "results.json").read_text())["cliff"]
    assert found["optimum"] == pytest.approx(-13)
    assert set(found) == {"optimum", "Q-learning", "Monte Carlo"}
    assert found["Q-learning"]["late"][0] > found["Monte Carlo"]["late"][0]
    assert "everything lies in" in capsys.readouterr().out


def test_a_second_run_takes_what_has_ended(tmp_path, monkeypatch):
    rounds = []

    def train(config, world, learner, rule):
        rounds.append(config.alpha)
        curve = np.ma.masked_invalid(np.random.default_rng(len(rounds)).normal(size=(config.seeds, tabular.BINS)))
        curve[0, 3] = np.ma.masked
        return tabular.Run(curve, np.arange(config.seeds) / 3)

    monkeypatch.setattr(tabular, "train", train)
    run(tmp_path, "--config.learners=('Q-learning',)")
    first = (tmp_path / "results.json").read_text()
    run(tmp_path, "--config.learners=('Q-learning',)")
    assert len(rounds) == 5  # Q-learning and four rules
    assert (tmp_path / "results.json").read_text() == first
    run(tmp_path, "--config.learners=('SARSA','Q-learning')")
    assert len(rounds) == 6
    run(tmp_path, "--config.learners=('Q-learning',)", "--config.alpha=0.2", "--accept_changes")
    assert rounds[6:] == [0.2] * 5  # nothing of another step size is passed off as its


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.worlds=()", "--config.worlds=() is empty: choose from lake"),
        ("--config.seed=-1", "at least 0"),
        ("--config.worlds=('moon',)", "is no world: choose from lake"),
        ("--config.learners=('guess',)", "is no learner: choose from SARSA"),
        ("--config.seeds=1", "at least 2"),
        ("--config.lam=1", "below 1"),
        ("--config.limit=5000", "no episode need end in 3000 steps"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flag, words):
    with pytest.raises(SystemExit):
        run(tmp_path, flag)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert words in line

"""The tabular experiment as a user runs it, small."""

import json

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


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.worlds=()", "--config.worlds=() is empty: choose from lake"),
        ("--config.seed=-1", "at least 0"),
        ("--config.worlds=('moon',)", "is no world: choose from lake"),
        ("--config.learners=('guess',)", "is no learner: choose from SARSA"),
        ("--config.seeds=1", "at least 2"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flag, words):
    with pytest.raises(SystemExit):
        run(tmp_path, flag)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert words in line

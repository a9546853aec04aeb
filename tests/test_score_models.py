"""Score matching and few-step models as a user runs them: a run, a second run, and mistakes."""

import json

import pytest

from diffrl import config as config_lib
from experiments import distillation, score_matching

pytestmark = pytest.mark.usefixtures("one_device")
FIELDS = [
    *("--config.width=8", "--config.depth=2", "--config.steps=4", "--config.inner=2", "--config.batch_size=16"),
    *("--config.seeds=1", "--config.optim.warmup_steps=1", "--config.only=('implicit',)"),
]
FEW = [
    *("--config.width=8", "--config.depth=2", "--config.inner=2", "--config.batch_size=16", "--config.samples=32"),
    *("--config.teacher_steps=2", "--config.consistency_steps=2", "--config.stage_steps=2"),
    *("--config.optim.warmup_steps=1", "--config.first_student=4"),
]


def run(experiment, workdir, *flags):
    config_lib.run(experiment.main, experiment.PRESETS, argv=[f"--workdir={workdir}", *flags])


@pytest.mark.long
def test_fields_are_learned_once(tmp_path, capsys):
    run(score_matching, tmp_path, *FIELDS)
    (path,) = (tmp_path / "runs").iterdir()
    written = path.stat().st_mtime_ns
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert 0.5 < row["data"]["mean"] < 10  # four steps of a tiny network: about the field 0, whose error is 1
    run(score_matching, tmp_path)
    assert path.stat().st_mtime_ns == written
    assert (tmp_path / "fields.png").exists()
    assert f"everything lies in {tmp_path}" in capsys.readouterr().out


@pytest.mark.long
def test_few_step_models_are_scored_beside_their_teacher(tmp_path):
    run(distillation, tmp_path, *FEW)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {row["calls"] for row in rows if row["method"].startswith("progressive")} == {1, 2, 4}
    data, *others = rows
    assert all(row["distance"] > data["distance"] > 0 for row in others)
    for name in ("table.md", "quality.png", "samples.png"):
        assert (tmp_path / name).stat().st_size > 100


@pytest.mark.parametrize(
    ("experiment", "flag", "words"),
    [
        (score_matching, "--config.only=('exact',)", "no objective"),
        (score_matching, "--config.means=circle", "ring or grid"),
        (score_matching, "--config.inner=3", "divides steps=2000"),
        (score_matching, "--config.noise=()", "noise=()"),
        (distillation, "--config.first_student=6", "a power of 2"),
        (distillation, "--config.curriculum=(8,4)", "the smaller first"),
        (distillation, "--config.stage_steps=25", "a multiple of inner=50"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, experiment, flag, words):
    with pytest.raises(SystemExit) as stop:
        run(experiment, tmp_path / "run", flag)
    assert stop.value.code == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line

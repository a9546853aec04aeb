"""Score matching and few-step models as a user runs them: a run, a second run, and mistakes."""

import json

import numpy as np
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


@pytest.fixture
def fields(monkeypatch):
    """The runs (objective, steps, seed) that were trained; a field is as strong everywhere as its run had steps."""
    done = []

    def train(config, problem, method, trainer, seed, name):
        done.append((name, config.steps, seed))
        return {"field": np.full((score_matching.PIXELS**2, 2), float(config.steps)), "seconds": 1.0}

    monkeypatch.setattr(score_matching, "make_trainer", lambda *given: "a trainer")
    monkeypatch.setattr(score_matching, "train", train)
    monkeypatch.setattr(score_matching, "draw_fields", lambda *given: None)
    return done


def match(workdir, *flags):
    run(score_matching, workdir, *FIELDS, *flags)
    return json.loads((workdir / "results.json").read_text())[0]["data"]["mean"]


@pytest.mark.parametrize(
    ("flags", "runs"),
    [
        ([], []),
        (["--config.seeds=2"], [("implicit", 4, 1)]),
        (["--config.steps=200"], [("implicit", 200, 0)]),
        (["--config.batch_size=8"], [("implicit", 4, 0)]),
        (["--config.optim.learning_rate=1"], [("implicit", 4, 0)]),
        (["--config.std=0.2"], [("implicit", 4, 0)]),
        (["--config.noise=(0.1,0.3)"], []),  # of other objectives
        (["--config.only=('sliced at all levels',)", "--config.level=0.2"], [("sliced at all levels", 4, 0)]),
    ],
)
def test_fields_are_used_where_they_belong(tmp_path, fields, flags, runs):
    first = match(tmp_path)
    assert fields == [("implicit", 4, 0)]
    fields.clear()
    second = match(tmp_path, *flags, "--accept_changes")
    assert fields == runs
    assert (second > 100 * first) == ("--config.steps=200" in flags)
    fields.clear()
    assert match(tmp_path, "--preset=ring", "--accept_changes") == first  # which is still there
    assert fields == []


def test_the_level_of_comparison_enters_where_the_network_knows_levels(tmp_path, fields):
    only = "--config.only=('implicit','denoising at all levels')"
    match(tmp_path, only)
    fields.clear()
    match(tmp_path, only, "--config.level=0.2", "--accept_changes")
    assert fields == [("denoising at all levels", 4, 0)]


@pytest.mark.parametrize("rest", [0, 1, 100, -1])
def test_a_damaged_field_is_set_aside_and_learned_anew(tmp_path, fields, capsys, rest):
    first = match(tmp_path)
    (path,) = (tmp_path / "runs").iterdir()
    damaged = path.read_bytes()[:rest]
    path.write_bytes(damaged)
    fields.clear()
    capsys.readouterr()
    assert match(tmp_path) == first
    assert fields == [("implicit", 4, 0)]
    aside = path.with_name(f"{path.name}.damaged")
    assert aside.read_bytes() == damaged
    said = [line for line in capsys.readouterr().err.splitlines() if str(path) in line]
    assert said == [f"{path} cannot be read: kept as {aside.name}, and trained anew"]


@pytest.fixture
def learned(monkeypatch):
    """The few-step models that were trained, by name; nothing is compiled, and a step changes nothing."""
    done = []

    def fit(program, state, data, *, steps, inner, checkpoints, desc):
        if not checkpoints.has(steps):
            done.append(desc)
            checkpoints.save(steps, state, data.get_state())
        return state

    monkeypatch.setattr(distillation.loop, "fit", fit)
    monkeypatch.setattr(distillation.mesh, "compile_repeated", lambda *given: None)
    rows = [{"method": name, "calls": calls, "distance": 1.0} for calls, name in enumerate(("data", "student"))]
    monkeypatch.setattr(distillation, "evaluate", lambda *given: (rows, {"data": "."}))
    monkeypatch.setattr(distillation, "table", lambda *given: "a table")
    monkeypatch.setattr(distillation, "draw_samples", lambda *given: None)
    monkeypatch.setattr(distillation.plots, "curves", lambda *given, **options: None)
    return done


STUDENTS = ["student_4", "student_2", "student_1"]
ALL = ["teacher", "distilled", "trained", *STUDENTS]


def test_few_step_models_are_used_where_they_belong(tmp_path, learned):
    def few(*flags):
        learned.clear()
        run(distillation, tmp_path, *FEW, *flags, "--accept_changes")
        return list(learned)

    assert few() == ALL
    assert few("--config.samples=16") == []
    assert few("--config.huber=0.1") == ["distilled"]
    assert few("--config.curriculum=(10,20)") == ["trained"]
    assert few("--config.first_student=8") == ["student_8", *STUDENTS]
    assert few("--config.optim.learning_rate=1") == ALL
    assert few("--config.teacher_steps=4") == ALL
    assert few("--preset=checkerboard") == []  # the first are still there


@pytest.mark.parametrize(
    ("experiment", "flag", "words"),
    [
        (score_matching, "--config.only=('exact',)", "no objective"),
        (score_matching, "--config.means=circle", "ring or grid"),
        (score_matching, "--config.inner=3", "divides steps=2000"),
        (score_matching, "--config.noise=()", "noise=()"),
        (score_matching, "--config.noise=(0.1,2.0)", "expected above 0 and below 2"),
        (score_matching, "--config.level=0", "expected above 0 and below 2"),
        (score_matching, "--config.std=0", "expected above 0"),
        *(
            (score_matching, f"--config.{name}=0", "expected at least 1")
            for name in ("width", "depth", "steps", "batch_size", "inner", "seeds")
        ),
        *(
            (distillation, f"--config.{name}=-3", "expected at least 1")
            for name in ("width", "depth", "batch_size", "teacher_steps", "consistency_steps", "stage_steps", "rungs")
        ),
        (distillation, "--config.inner=0", "expected at least 1"),
        (distillation, "--config.curriculum=(0,4)", "expected at least 1"),
        (distillation, "--config.first_student=2", "expected at least 4"),
        (distillation, "--config.samples=14", "expected at least 15"),
        (distillation, "--config.huber=0", "expected above 0"),
        (distillation, "--config.seed=-1", "expected at least 0"),
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

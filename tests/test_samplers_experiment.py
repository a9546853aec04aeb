"""The experiment on samplers as a user runs it: trains, measures, resumes, takes a model that was trained before."""

import json

import pytest

from diffrl import config as config_lib
from diffrl import config_tree
from experiments import samplers

TINY = [
    "--config.image.unet.channels=8",
    "--config.image.unet.groups=4",
    "--config.image.unet.multipliers=(1,)",
    "--config.image.unet.attention=()",
    "--noconfig.image.unet.middle_attention",
    "--config.image.train.steps=2",
    "--config.image.train.batch_size=16",
    "--config.image.optim.warmup_steps=1",
    "--config.image.mesh.data=1",
    "--config.image.mesh.fsdp=8",
    "--config.image.eval.samples=32",
    "--config.points=256",
    "--config.budgets=(3,6)",
    "--config.image_budgets=(2,4)",
    "--config.grid_budget=4",
    "--config.reference_steps=8",
]


def run(workdir, *flags):
    config_lib.run(samplers.main, samplers.PRESETS, argv=[f"--workdir={workdir}", *flags])


def test_quality_is_measured_once_and_a_trained_model_is_taken(tmp_path, capsys):
    workdir = tmp_path / "run"
    run(workdir, *TINY, "--config.methods=('DPM-Solver++(2M)',)")
    assert {"quality.png", "samples.png", "table.md", "results.json"} <= {path.name for path in workdir.iterdir()}
    results = json.loads((workdir / "results.json").read_text())
    rows = results["mixture"]["DPM-Solver++(2M)"]["rows"]
    assert [row["calls"] for row in rows] == [3, 6]
    assert results["mixture, real"]["wasserstein"] < rows[0]["wasserstein"] < 2.0
    assert set(results["mixture"]["DPM-Solver++(2M)"]["grids"]) == set(samplers.GRIDS)
    assert f"everything lies in {workdir}" in capsys.readouterr().out

    run(workdir, *TINY, "--config.methods=('DPM-Solver++(2M)',)")  # nothing is left to do
    assert json.loads((workdir / "results.json").read_text()) == results

    config, _, _ = config_lib.parse([f"--workdir={workdir}"], samplers.PRESETS)
    config_tree.save(workdir / "model", "digits", config.image)  # as experiments.ddpm leaves it
    other = tmp_path / "other"
    run(other, *TINY, f"--config.model={workdir / 'model'}", "--config.methods=('DPM-Solver++(2M)',)")
    assert json.loads((other / "results.json").read_text())["images"] == results["images"]


def test_steps_never_cost_more_than_the_budget():
    heun, ddim = samplers.methods()["Heun (EDM)"], samplers.methods()["DDIM = Euler"]
    assert [heun.steps(budget) for budget in (1, 2, 3, 4, 35)] == [1, 1, 2, 2, 18]  # 2 N - 1 calls
    assert ddim.steps(7) == 7


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.methods=('Milstein',)", "choose one of DDIM"),
        ("--config.grid=sigmoid", "choose one of linear"),
        ("--config.budgets=(0,4)", "at least one network call"),
        ("--config.model=nowhere", "holds no run"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flag, words):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", *TINY, flag)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]

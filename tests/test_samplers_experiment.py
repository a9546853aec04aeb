"""The experiment on samplers as a user runs it: trains, measures, resumes, takes a model that was trained before."""

import json

import jax
import jax.numpy as jnp
import pytest

from diffrl import config as config_lib
from diffrl import config_tree
from diffrl.diffusion import process, times
from diffrl.diffusion.sampling import sample
from diffrl.recipes import solvers
from experiments import samplers

pytestmark = pytest.mark.usefixtures("one_device")
TINY = [
    "--config.image.unet.channels=8",
    "--config.image.unet.groups=4",
    "--config.image.unet.multipliers=(1,)",
    "--config.image.unet.attention=()",
    "--noconfig.image.unet.middle_attention",
    "--config.image.train.steps=2",
    "--config.image.train.batch_size=16",
    "--config.image.optim.warmup_steps=1",
    "--config.image.eval.samples=32",
    "--config.points=256",
    "--config.budgets=(3,6)",
    "--config.image_budgets=(2,4)",
    "--config.grid_budget=4",
    "--config.reference_steps=8",
]


def run(workdir, *flags):
    config_lib.run(samplers.main, samplers.PRESETS, argv=[f"--workdir={workdir}", *flags])


@pytest.mark.long
def test_quality_is_measured_once_and_a_trained_model_is_taken(tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "run"

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(samplers.np, "save", killed)  # of the first images
        with pytest.raises(SystemExit):
            run(workdir, *TINY, "--config.methods=('DPM-Solver++(2M)',)")
    halfway = json.loads((workdir / "results.json").read_text())
    assert (len(halfway["mixture"]), len(halfway["images"])) == (1, 0)
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

    config, _, _ = config_lib.parse([f"--workdir={workdir}"], samplers.PRESETS, name="samplers")
    config_tree.save(workdir / "model", "digits", config.image)  # as experiments.ddpm leaves it
    other = tmp_path / "other"
    run(other, *TINY, f"--config.model={workdir / 'model'}", "--config.methods=('DPM-Solver++(2M)',)")
    assert json.loads((other / "results.json").read_text())["images"] == results["images"]


@pytest.mark.parametrize("name", solvers.methods(solvers.SolverConfig()))
def test_a_budget_is_spent_and_never_exceeded(name):
    method = solvers.methods(solvers.SolverConfig())[name]
    called = []

    def denoise(x, t, cond):
        called.append(t)
        return 0.5 * x

    for budget in (1, 4, 5):
        steps = method.steps(budget)
        called.clear()
        with jax.disable_jit():
            sampler = solvers.still_at_the_end(method.make(process.flow(), denoise, jnp.float32(steps)))
            grid = jnp.pad(times.linear_grid(steps, 0.9), (0, 2))  # a longer one's program
            x = sample(sampler, jax.random.key(0), jnp.ones((1, 2)), grid)
        assert len(called) == method.calls * (steps - 1) + 1
        assert budget - method.calls < len(called) <= budget
        assert jnp.isfinite(x).all()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.methods=('Milstein',)", "choose one of DDIM"),
        ("--config.grid=sigmoid", "choose one of linear"),
        ("--config.budgets=(0,4)", "expected at least 1"),
        ("--config.budgets=()", "budgets=(): expected at least one number"),
        ("--config.image_budgets=()", "image_budgets=(): expected at least one number"),
        ("--config.grid_budget=0", "expected at least 1"),
        ("--config.reference_steps=0", "expected at least 1"),
        ("--config.points=0", "expected at least 4"),
        ("--config.sigma_min=0", "expected above 0"),
        ("--config.sigma_max=-1", "expected above 0"),
        ("--config.sigma_min=90", "sigma_min=90.0 is not below"),  # though the grid is the linear one
        ("--config.solver.snr=-1", "solver.snr=-1.0: expected at least 0"),
        ("--config.model=nowhere", "no run here"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flag, words):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", *TINY, flag)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]

"""The experiment on samplers as a user runs it: trains, measures, resumes, takes a model that was trained before."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
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
    (halfway,) = workdir.glob("*/results.json")
    assert halfway.parent.name.startswith("mixture-")
    assert len(json.loads(halfway.read_text())) == 1
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
    (model,) = workdir.glob("model-*")
    config_tree.save(model, "digits", config.image)  # as experiments.ddpm leaves it
    other = tmp_path / "other"
    run(other, *TINY, f"--config.model={model}", "--config.methods=('DPM-Solver++(2M)',)")
    assert json.loads((other / "results.json").read_text())["images"] == results["images"]


@pytest.fixture
def measured(monkeypatch):
    """What was measured, ("mixture" or "images", sampler), of a model whose weights and step are `of`."""
    done = types.SimpleNamespace(rows=[], of=types.SimpleNamespace(step=600, ema={"w": np.zeros(2)}), models=[])

    def state(session):
        done.models.append(session.workdir)
        return done.of

    def measure(config, problem, method, ends, devices):
        images = len(problem.shape) == 3
        done.rows.append("images" if images else "mixture")
        score = {"frechet" if images else "wasserstein": float(len(done.rows))}
        budgets = [{"budget": n, "steps": n, "calls": n, **score} for n in problem.budgets]
        return {"rows": budgets, "grids": dict.fromkeys(problem.grids, score)}, np.zeros((4, *problem.shape))

    monkeypatch.setattr(samplers.images, "train", state)
    monkeypatch.setattr(samplers.images, "restored_state", state)
    monkeypatch.setattr(samplers, "measure", measure)
    monkeypatch.setattr(samplers, "make_drawer", lambda *_: lambda grid, num: np.zeros(1))
    monkeypatch.setattr(samplers, "plot", lambda *_: None)
    return done


def measure_again(workdir, measured, *flags):
    """The results, and what had to be measured for them."""
    measured.rows.clear()
    run(workdir, *TINY, "--preset=digits", "--config.methods=('UniPC-2',)", *flags, "--accept_changes")
    return json.loads((workdir / "results.json").read_text()), list(measured.rows)


@pytest.mark.parametrize(
    ("flag", "other", "again"),
    [
        ("--config.image.optim.learning_rate=0.1", True, ["images"]),
        ("--config.image.train.steps=1", True, ["images"]),
        ("--config.image.eval.samples=20", False, ["images"]),
        ("--config.image.train.log_every=7", False, []),
        ("--config.points=128", False, ["mixture"]),
        ("--config.grid=karras", False, ["mixture", "images"]),
    ],
)
def test_models_and_scores_are_used_where_they_belong_and_are_kept(tmp_path, capsys, measured, flag, other, again):
    first, done = measure_again(tmp_path, measured)
    assert done == ["mixture", "images"]
    assert (first["images, made by"]["step"], len(first["images, made by"]["weights"])) == (600, 16)
    capsys.readouterr()
    measured.of = types.SimpleNamespace(step=600, ema={"w": np.full(2, float(other))})
    _, done = measure_again(tmp_path, measured, flag)
    assert done == again
    assert (measured.models[1] != measured.models[0]) == other
    assert capsys.readouterr().err.count("begins anew") == other + len(again)
    measured.of = types.SimpleNamespace(step=600, ema={"w": np.zeros(2)})
    assert measure_again(tmp_path, measured) == (first, [])  # all of it is still there
    assert measured.models[2] == measured.models[0]


def test_a_model_that_has_trained_on_is_measured_anew(tmp_path, measured):
    """Of another's run, as its weights say; the mixture does not mind."""
    config = samplers.digits()
    config_tree.save(tmp_path / "ddpm", "digits", config.image)
    flags = f"--config.model={tmp_path / 'ddpm'}"
    first, done = measure_again(tmp_path / "run", measured, flags)
    assert done == ["mixture", "images"]
    assert measure_again(tmp_path / "run", measured, flags) == (first, [])
    before = measured.of
    measured.of = types.SimpleNamespace(step=700, ema={"w": np.ones(2)})
    second, done = measure_again(tmp_path / "run", measured, flags)
    assert done == ["images"]
    assert second["images, made by"]["step"] == 700
    assert second["mixture"] == first["mixture"]
    measured.of = before
    assert measure_again(tmp_path / "run", measured, flags) == (first, [])


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
        ("--config.image.eval.judge=resnet", "measured by a judge"),  # before the training
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flag, words):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", *TINY, flag)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]

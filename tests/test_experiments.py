"""The experiments as a user runs them: train, resume, sample and evaluate, with networks small enough for a test."""

import json

import jax
import numpy as np
import pytest

from diffrl import config as config_lib
from diffrl.data.source import from_arrays
from diffrl.recipes import denoising, image_runs, images
from experiments import ddpm

TINY = [
    "--config.unet.channels=8",
    "--config.unet.groups=4",
    "--config.unet.blocks=1",
    "--config.unet.attention=()",
    "--config.train.batch_size=16",
    "--config.optim.warmup_steps=1",
    "--config.optim.schedule=constant",
    "--config.train.checkpoint_every=3",
    "--config.train.sample_every=0",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=8",
    "--config.sample.steps=3",
    "--config.eval.samples=16",
    "--config.eval.bound_images=8",
    "--config.eval.bound_steps=4",
]


def run(workdir, *flags, experiment=ddpm, presets=None, modes=("train", "sample", "eval")):
    config_lib.run(experiment.main, presets or experiment.PRESETS, modes=modes, argv=[f"--workdir={workdir}", *flags])


def parameters(workdir, step):
    """The arrays of a checkpoint, as a session restores them."""
    config, started, _ = config_lib.parse(
        [f"--workdir={workdir}", "--mode=sample"], ddpm.PRESETS, ("train", "sample"), "ddpm"
    )
    restored = images.restored_state(images.open_session(config, started))
    assert int(restored.step) == step
    return jax.tree.map(np.asarray, restored._replace(key=jax.random.key_data(restored.key)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    run(workdir, *TINY, "--config.train.steps=6")
    return workdir


def test_a_run_leaves_what_a_user_looks_for(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "metrics.jsonl", "samples.png", "loss.png", "eval.json"} <= names
    assert {"checkpoints", "tensorboard"} <= names
    scores = json.loads((trained / "eval.json").read_text())
    assert scores["step"] == 6
    assert scores["samples"] == 16
    assert 0 <= scores["recognised"] <= 1
    assert scores["recognised_real"] > 0.9
    assert scores["frechet"] > scores["frechet_real"] > 0  # six steps of a tiny network are no digits yet


@pytest.mark.long
def test_an_interrupted_run_ends_as_an_uninterrupted_one(trained, tmp_path):
    run(tmp_path, *TINY, "--config.train.steps=3")
    run(tmp_path, *TINY, "--config.train.steps=6")
    jax.tree.map(np.testing.assert_array_equal, parameters(tmp_path, 6), parameters(trained, 6))


def test_a_finished_run_only_scores_again(trained, capsys):
    before, path = (trained / "metrics.jsonl").read_text(), trained / "eval.json"
    path.write_text(json.dumps({"step": 6, "recognised": 2.0, "bits_per_dim": 3.0}))  # as --mode=eval leaves it
    run(trained, *TINY, "--config.train.steps=6")
    assert (trained / "metrics.jsonl").read_text() == before
    scores = json.loads(path.read_text())
    assert scores["bits_per_dim"] == 3.0  # not measured again, and of the same step
    assert scores["recognised"] <= 1
    assert f"everything lies in {trained}" in capsys.readouterr().out


def test_sample_mode_draws_what_was_asked(trained):
    run(trained, "--mode=sample", "--config.sample.count=12", "--config.sample.batch=8")
    made = np.load(trained / "samples.npz")
    assert made["x"].shape == (12, 8, 8, 1)
    assert made["x"].dtype == np.uint8
    assert sorted(made["label"]) == [0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    run(trained, "--mode=sample", "--config.sample.count=12", "--config.sample.batch=16")
    again = np.load(trained / "samples.npz")["x"].astype(int)
    assert np.abs(again - made["x"]).max() <= 1  # sample i does not depend on the batch it is drawn in


@pytest.mark.long
def test_eval_mode_measures_bits_per_dim(trained, capsys):
    run(trained, "--mode=eval", "--config.eval.nll_images=4", "--config.eval.nll_steps=3")
    scores = json.loads((trained / "eval.json").read_text())
    assert 2 < scores["bits_per_dim"] < 40  # finite, and worse than any trained model
    assert 2 < scores["exact_bits_per_dim"] < 40
    assert scores["nll_images"] == 4
    assert capsys.readouterr().out.count("bits/dim") == 2


def test_only_the_first_process_writes(trained, monkeypatch):
    files = {path: path.stat().st_mtime_ns for path in trained.glob("*.*")}
    config, started, _ = config_lib.parse(
        [f"--workdir={trained}", "--mode=sample"], ddpm.PRESETS, ("train", "sample"), "ddpm"
    )
    session = images.open_session(config, started)
    monkeypatch.setattr(images, "restored_state", images.initial_state)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    image_runs.sample(session)
    image_runs.score(session, images.initial_state(session), image_runs.judging.held_out_source(session), bound=False)
    images.plot_loss(session)
    assert {path: path.stat().st_mtime_ns for path in trained.glob("*.*")} == files


def test_pictures_have_a_limit_and_files_have_not():
    assert image_runs.pictured(None, 50_000).sum() == image_runs.ROWS * image_runs.COLUMNS
    assert image_runs.pictured(None, 7).all()
    labels = np.repeat(np.arange(1000), 30)
    shown = labels[image_runs.pictured(labels, len(labels))]
    np.testing.assert_array_equal(np.unique(shown, return_counts=True)[1], [image_runs.COLUMNS] * image_runs.ROWS)


@pytest.mark.long
def test_learned_variance_on_unlabelled_images(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "noise.npz", x=rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    workdir = tmp_path / "run"
    run(
        workdir,
        *TINY,
        "--config.train.steps=2",
        "--config.data.name=npz",
        f"--config.data.dir={tmp_path / 'noise.npz'}",
        "--config.diffusion.process=improved",
        "--config.diffusion.prediction=eps",
        "--config.diffusion.learned_variance",
        "--config.diffusion.table_steps=10",
        "--config.sample.sampler=ancestral",
        "--config.sample.grid=table",
        "--config.train.inner=2",
    )
    assert (workdir / "samples.png").exists()
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["vlb"] > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.diffusion.prediction=epsilon"], "choose one of eps"),
        (["--config.train.batch_size=12"], "batch size 12 is not divisible by 8 devices: take 16"),
        (["--config.data.name=toy:moons"], "needs images"),
        (["--config.unet.multipliers=(1,2,2,2,2)"], "cannot be halved"),
        (["--config.sample.steps=0"], "sample.steps=0"),
        (["--config.eval.judge=inception"], "choose one of mlp"),
        (["--config.eval.dequantisation=none"], "choose one of uniform"),
        (["--config.train.log_every=0"], "--config.train.log_every=0: expected at least 1"),
        (["--config.unet.attention=(4,3)"], "never have 3; choose from 8, 4"),
        (["--config.unet.multipliers=()"], "unet.multipliers=()"),
        (["--mode=sample"], "no run"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", *TINY, "--config.train.steps=2", *flags)
    assert stop.value.code == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line


@pytest.mark.parametrize("preset", ddpm.PRESETS)
def test_presets_are_complete(preset):
    config = ddpm.PRESETS[preset]()
    size, channels, classes = {"digits": (8, 1, 10), "mnist": (28, 1, 10), "imagenet64": (64, 3, 1000)}.get(
        preset, (32, 3, 10)
    )
    source = from_arrays(np.zeros((2, size, size, channels), np.uint8), np.zeros(2, int), num_classes=classes)
    model = images.build(config, source)
    count = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
    published = {"cifar10": 35_746_307, "imagenet64": 295_905_222}  # the latter with the null class's row
    assert count == published.get(preset, count)
    grid = denoising.make_grid(model.diffusion, config.sample, config.diffusion.table_steps)
    assert len(grid) == config.sample.steps + 1
    assert np.all(np.diff(grid) < 0)
    assert grid[-1] == 0


@pytest.mark.slow
def test_digits_are_recognised(tmp_path):
    """The first command of the README, with its promise."""
    run(tmp_path, "--config.mesh.data=-1")
    scores = json.loads((tmp_path / "eval.json").read_text())
    assert scores["recognised"] >= 0.95
    assert scores["recognised_real"] >= 0.97
    assert scores["frechet"] < 5

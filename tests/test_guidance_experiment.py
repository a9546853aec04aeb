"""The guidance experiment as a user runs it, with networks small enough for a test."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl import config as config_lib
from diffrl.data.source import from_arrays
from diffrl.nets.classifier import NoisyClassifier
from diffrl.recipes import denoising, images
from experiments import guidance

TINY = [
    "--config.model.unet.channels=8",
    "--config.model.unet.groups=4",
    "--config.model.train.steps=2",
    "--config.model.train.batch_size=16",
    "--config.model.optim.warmup_steps=1",
    "--config.model.sample.steps=2",
    "--config.model.sample.batch=16",
    "--config.model.eval.samples=20",
    "--config.weak_channels=4",
    "--config.weak_steps=2",
    "--config.classifier.channels=8",
    "--config.classifier.groups=4",
    "--config.classifier.steps=2",
    "--config.classifier.optim.warmup_steps=1",
    "--config.scales=(1.0,3.0)",
    "--config.classifier_scales=(0.0,2.0)",
]


def run(workdir, *flags):
    config_lib.run(guidance.main, guidance.PRESETS, argv=[f"--workdir={workdir}", *TINY, *flags])


@pytest.mark.slow
def test_a_sweep_and_its_resume(tmp_path, capsys):
    methods = "--config.methods=('interval','APG','autoguidance','classifier','through x0')"
    run(tmp_path, methods)
    first = json.loads((tmp_path / "results.json").read_text())
    rows = first["methods"]
    assert [row["scale"] for row in rows["interval"]] == [1.0, 3.0]
    assert [row["scale"] for row in rows["through x0"]] == [0.0, 2.0]
    # Every method starts at the plain conditional model, and goes a way of its own.
    first_contrast, last_contrast = ([points[i]["contrast"] for points in rows.values()] for i in (0, 1))
    np.testing.assert_allclose(first_contrast, first_contrast[0], rtol=1e-4)
    assert len({f"{value:.6f}" for value in last_contrast}) == len(rows)
    assert first["real"]["recognised"] > 0.9
    assert (tmp_path / "samples" / "through_x0.png").exists()
    shutil.rmtree(tmp_path / "samples")
    capsys.readouterr()
    run(tmp_path, methods)  # finished: it only reports
    assert json.loads((tmp_path / "results.json").read_text()) == first
    assert not (tmp_path / "samples").exists()
    assert "| APG | 3 |" in capsys.readouterr().out
    assert (tmp_path / "tradeoff.png").exists()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.methods=('magic',)", "choose one of classifier-free"),
        ("--config.model.eval.judge=none", "measured by a judge"),
        ("--noconfig.model.conditional", "needs its labels"),
        ("--config.weak_channels=0", "expected at least 1"),
        ("--config.weak_channels=6", "groups=4 does not divide the levels' channels [6, 12]"),
        ("--config.weak_steps=0", "expected at least 1"),
        ("--config.scales=()", "at least one scale"),
        ("--config.scales=(1.0,-1.0)", "expected at least 0"),
        ("--config.classifier_scales=()", "at least one scale"),
        ("--config.low=3", "a value below high=3"),
        ("--config.phi=1.5", "at most 1"),
        ("--config.eta=-1", "at least 0"),
        ("--config.radius=0", "above 0"),
        ("--config.beta=1", "below 1"),
        ("--config.sets=0", "expected at least 1"),
        *(
            (f"--config.classifier.{name}=0", f"classifier.{name}=0: expected at least 1")
            for name in ("channels", "blocks", "heads", "groups", "steps")
        ),
        ("--config.classifier.groups=3", "groups=3 does not divide 8 channels"),
        ("--config.classifier.heads=3", "a divisor of the last level's 16"),
        ("--config.classifier.multipliers=(1,0)", "at least 1"),
        ("--config.classifier.multipliers=()", "one for each level"),
        ("--config.classifier.dropout=1", "below 1"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flag, words):
    with pytest.raises(SystemExit):
        run(tmp_path, flag)
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_the_cifar10_preset_is_complete():
    """Its networks fit 32x32 colour images, and its grid ends with data."""
    config = guidance.cifar10()
    source = from_arrays(np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2, int), num_classes=10)
    for channels in (config.model.unet.channels, config.weak_channels):
        config.model.unet.channels = channels
        model = images.build(config.model, source)
        assert jax.eval_shape(model.init, jax.random.key(0))
    settings = config.classifier
    network = NoisyClassifier(10, settings.channels, settings.multipliers, settings.blocks, groups=settings.groups)
    logits = jax.eval_shape(network.init_with_output, jax.random.key(0), jnp.zeros((2, 32, 32, 3)), jnp.zeros(2))[0]
    assert logits.shape == (2, 10)
    grid = denoising.make_grid(model.diffusion, config.model.sample, config.model.diffusion.table_steps)
    assert len(grid) == 33
    assert grid[-1] == 0

"""The guidance experiment as a user runs it, with networks small enough for a test."""

import json
import shutil
import types

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
    (pictures,) = tmp_path.glob("sweep-*/samples")
    assert (pictures / "through_x0.png").exists()
    shutil.rmtree(pictures)
    capsys.readouterr()
    run(tmp_path, methods)  # finished: it only reports
    assert json.loads((tmp_path / "results.json").read_text()) == first
    assert not pictures.exists()
    assert "| APG | 3 |" in capsys.readouterr().out
    assert (tmp_path / "tradeoff.png").exists()


ALL = ["model", "weak", "classifier"]


@pytest.mark.parametrize(
    ("flag", "anew", "measures"),
    [
        ("--config.model.optim.learning_rate=0.1", ["model", "weak"], True),
        ("--config.model.unet.channels=16", ["model"], True),
        ("--config.model.train.steps=1", ["model"], True),  # fewer than the model has gone
        ("--config.weak_steps=1", ["weak"], True),
        ("--config.classifier.steps=1", ["classifier"], True),
        ("--config.model.train.batch_size=8", ALL, True),
        ("--config.phi=0.5", [], True),
        ("--config.model.eval.samples=10", [], True),
        ("--config.model.train.log_every=7", [], False),
    ],
)
def test_networks_and_scores_are_used_where_they_belong_and_are_kept(
    tmp_path, capsys, monkeypatch, flag, anew, measures
):
    """What was made with other settings is neither taken for those of the run nor lost."""
    opened, swept = [], []

    def train(session):
        opened.append(session.workdir)
        (session.workdir / "trained").touch()
        return types.SimpleNamespace(ema=None)

    def sweep(config, name, *rest):
        swept.append(name)
        scores = dict.fromkeys(("recognised", "precision", "recall", "frechet", "spread", "contrast"), len(swept))
        return [{"scale": 1.0, **scores}]

    monkeypatch.setattr(guidance.images, "train", train)
    monkeypatch.setattr(guidance, "sweep", sweep)
    monkeypatch.setattr(guidance.noisy_classifier, "accuracies", lambda *_: [0.1] * len(guidance.TIMES))
    real = dict.fromkeys(("recognised", "precision", "recall", "frechet", "spread", "contrast"), 1.0)
    ruler = types.SimpleNamespace(judge=types.SimpleNamespace(name="MLP"))
    monkeypatch.setattr(guidance.fidelity, "make_ruler", lambda *_: (ruler, real))

    def rows(*flags):
        opened.clear()
        run(tmp_path, "--config.methods=('APG',)", *flags, "--accept_changes")
        return json.loads((tmp_path / "results.json").read_text())["methods"]["APG"]

    first, before = rows(), list(opened)
    assert [path.name.partition("-")[0] for path in before] == ALL
    capsys.readouterr()
    second = rows(flag)
    assert [old.name.partition("-")[0] for old, new in zip(before, opened, strict=True) if old != new] == anew
    said = [line for line in capsys.readouterr().err.splitlines() if "begins anew" in line]
    assert len(said) == len(anew) + measures
    assert (second != first) == measures
    assert rows(f"{flag.partition('=')[0]}={config_value(flag)}") == first  # which is still there
    assert opened == before
    assert all((path / "trained").exists() for path in before)
    assert len(swept) == 1 + measures


def config_value(flag):
    """What the leaf was before."""
    name = flag.partition("=")[0]
    given = dict(argument.split("=", 1) for argument in TINY)
    leaf = config_lib.leaves(guidance.digits())[name.removeprefix("--config.")]
    return given.get(name, leaf.value)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.model.eval.judge=resnet", "measured by a judge"),  # before any training
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

"""The editing experiment as a user runs it: train, restore, edit; again, with another's model; and its mistakes."""

import json
import types

import numpy as np
import pytest

from diffrl import config as config_lib
from diffrl.errors import UserError
from diffrl.evaluate import lpips
from diffrl.pretrained import lpips_alexnet
from diffrl.recipes import images
from experiments import editing

pytestmark = pytest.mark.usefixtures("one_device")
TRAINING = [
    "unet.channels=8",
    "unet.multipliers=(1,)",
    "unet.groups=4",
    "unet.attention=()",
    "unet.middle_attention=false",
    "train.batch_size=16",
    "train.steps=2",
    "train.checkpoint_every=2",
    "optim.warmup_steps=1",
    "optim.schedule=constant",
]
QUICK = [
    *(f"--config.base.{flag}" for flag in TRAINING),
    "--config.restoration.steps=4",
    "--config.restoration.jump=1",
    "--config.restoration.resample=2",
    "--config.count=6",
    "--config.collages=6",
    "--config.strengths=(0.3,0.6)",
]


def run(workdir, *flags):
    config_lib.run(editing.main, editing.PRESETS, argv=[f"--workdir={workdir}", *flags])


def test_tables_pictures_and_known_pixels(tmp_path, capsys):
    run(tmp_path, *QUICK, "--config.tasks=('middle hidden','2 times smaller')", "--config.methods=('RePaint',)")
    assert f"everything lies in {tmp_path}" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(row["task"], row["method"]) for row in results["restoration"]] == [
        ("middle hidden", "pseudo-inverse"),
        ("middle hidden", "RePaint"),
        ("2 times smaller", "pseudo-inverse"),  # of which RePaint knows nothing
    ]
    assert all(np.isfinite(row["psnr"]) for row in results["restoration"])
    assert [row.get("calls") for row in results["restoration"]] == [None, 4 + 3, None]
    assert results["restoration"][1]["misfit"] < 1e-6  # whatever the model, RePaint keeps the known pixels
    assert results["sdedit"][1]["distance"] < results["sdedit"][2]["distance"]
    names = {path.name for path in tmp_path.iterdir()}
    assert {"table.md", "middle_hidden.png", "2_times_smaller.png", "sdedit.png"} <= names


@pytest.mark.long
def test_with_the_model_of_another_run(tmp_path):
    """A conditional one, asked without a label."""
    flags = [f"--config.{flag}" for flag in [*TRAINING, "eval.judge=none", "train.sample_every=0"]]

    def train(config, run):
        images.train(images.open_session(config, run))

    config_lib.run(train, {"digits": images.digits_config}, argv=[f"--workdir={tmp_path / 'ddpm'}", *flags])
    only = ["--config.tasks=('middle hidden',)", "--config.methods=('PiGDM',)"]
    run(tmp_path / "editing", *QUICK, *only, f"--config.model={tmp_path / 'ddpm'}")
    assert not list((tmp_path / "editing").glob("model*"))
    assert "PiGDM" in (tmp_path / "editing" / "table.md").read_text()


@pytest.fixture
def trained(monkeypatch):
    """The folders of the models that restored; nothing is trained or restored."""
    used = []

    def train(session):
        used.append(session.workdir)
        return types.SimpleNamespace(ema=None)

    monkeypatch.setattr(editing.images, "train", train)
    monkeypatch.setattr(editing, "restore_all", lambda *_: [])
    monkeypatch.setattr(editing, "edit_all", lambda *_: [])
    return used


@pytest.mark.parametrize(
    ("flag", "other"),
    [
        ("--config.base.optim.learning_rate=0.1", True),
        ("--config.base.unet.channels=4", True),
        ("--config.base.train.steps=1", True),  # fewer than the model has gone
        ("--config.base.eval.split=none", True),  # so that every tenth image is held out of the training
        ("--config.base.train.log_every=7", False),
        ("--config.count=4", False),
    ],
)
def test_a_model_of_other_settings_is_not_used_and_is_kept(tmp_path, capsys, trained, flag, other):
    base = [*QUICK, "--preset=digits", "--config.base.eval.judge=none", "--accept_changes"]
    run(tmp_path, *base)
    capsys.readouterr()
    run(tmp_path, *base, flag)
    first, second = trained
    assert (first != second) == other
    said = f"{second} begins anew: {first.name} came of other settings; give those again to go on with them"
    assert (said in capsys.readouterr().err) == other
    run(tmp_path, *base)
    assert trained[-1] == first
    assert first.is_dir()


def test_a_judge_without_weights_is_missed_before_the_training(tmp_path, capsys, trained, monkeypatch):
    def train(session):
        raise UserError("now it trains")

    monkeypatch.setattr(editing.images, "train", train)
    with pytest.raises(SystemExit):
        run(tmp_path, *QUICK, "--config.base.eval.judge=resnet")
    said, trains = capsys.readouterr().err.splitlines()
    assert said.startswith("no judge: --config.eval.judge_weights names no published ResNet")
    assert trains == "error: now it trains"


@pytest.mark.long
def test_lpips_with_the_published_weights(tmp_path, data_dir):
    faces, weights = (
        data_dir / "faces" / "olivetti_64x64.npz",
        data_dir / "metrics" / "lpips_v0.1_alexnet_flax_hwio.npz",
    )
    for path in (faces, weights):
        if not path.is_file():
            pytest.skip(f"{path} is absent")
    flags = ["--config.base.data.name=npz", f"--config.base.data.dir={faces}", "--config.count=4", "--config.factor=4"]
    only = ["--config.tasks=('4 times smaller',)", "--config.methods=('DDNM',)"]
    run(tmp_path, *QUICK, *flags, *only, f"--config.lpips_weights={weights}")
    enlarged, restored = json.loads((tmp_path / "results.json").read_text())["restoration"]
    # Of 400 images every tenth is held out; four of these 40 are taken, and made smaller by the mean of 4x4 pixels.
    x = np.load(faces)["images"][9::10][[0, 13, 26, 39], ..., None] / np.float32(127.5) - 1
    means = x.reshape(4, 16, 4, 16, 4, 1).mean(axis=(2, 4))
    expected = lpips.measure(*lpips_alexnet.load(weights), means.repeat(4, axis=1).repeat(4, axis=2), x).mean()
    assert enlarged["lpips"] == pytest.approx(expected, rel=1e-3)
    assert restored["lpips"] > 0
    assert f"| {restored['lpips']:.3f} | 4 |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.model=nowhere", "model=nowhere: no run here"),
        ("--config.factor=3", "cannot be made 3 times smaller"),
        ("--config.tasks=('hidden',)", "tasks='hidden' is not known: choose one of right half hidden"),
        ("--config.methods=('DDRM',)", "methods='DDRM' is not known"),
        ("--config.strengths=(0.5,1.0)", "expected above 0 and below 1"),
        *((f"--config.restoration.{name}=0", "expected at least 1") for name in ("steps", "jump", "resample")),
        *((f"--config.restoration.{name}=0", "expected above 0") for name in ("dps_scale", "data_variance")),
        ("--config.columns=0", "expected at least 1"),
        *((f"--config.{name}=1", "expected at least 2") for name in ("count", "collages", "factor")),
        ("--config.blur=0", "expected above 0"),
        ("--config.noise=-1", "expected at least 0"),
        ("--config.seed=-1", "expected at least 0"),
        ("--config.lpips_weights=absent.npz", "cannot be read as .npz"),
    ],
)
def test_mistakes_are_one_line_before_the_training(tmp_path, capsys, flag, words):
    with pytest.raises(SystemExit):
        run(tmp_path, *QUICK, flag)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not list(tmp_path.glob("model-*/checkpoints/2"))


def test_every_tenth_is_held_out_where_there_is_no_test_split(tmp_path):
    pictures = np.arange(20, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    np.savez(tmp_path / "images.npz", x=pictures)
    config = editing.digits()
    config.base.data.name, config.base.data.dir = "npz", str(tmp_path / "images.npz")
    session, held_out = editing.open_model(config, config_lib.Run(tmp_path / "run", "train", "digits"))
    assert session.source.length == 18
    seen, unseen = (source.fetch(np.arange(source.length))["x"][:, 0, 0, 0] for source in (session.source, held_out))
    assert unseen.tolist() == [9, 19]
    assert sorted([*seen, *unseen]) == list(range(20))

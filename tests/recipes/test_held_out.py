"""What samples are compared with, and by whom: held-out images of the same classes, a judge who knows them."""

import types

import numpy as np
import pytest
from PIL import Image

from diffrl.data import cifar
from diffrl.data.catalog import DataConfig, make_source
from diffrl.data.source import from_arrays
from diffrl.errors import UserError
from diffrl.recipes import images, judging, scores
from diffrl.recipes.images import EvalConfig, ImageConfig


def session(config):
    """As much of a session as the held-out images depend on."""
    return types.SimpleNamespace(config=config, source=make_source(config.data))


def put(folder, *files):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(folder / file)


def test_held_out_folders_are_matched_by_name(tmp_path):
    config = ImageConfig(data=DataConfig("folder", dir=str(tmp_path)))
    put(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/dog/1.png", "test/dog/2.png", "val/eel/1.png")
    held_out = judging.held_out_source(session(config))
    np.testing.assert_array_equal(held_out.fetch(np.arange(2))["label"], [1, 1])
    config.eval.split = "val"
    with pytest.raises(UserError, match=r"val has a class 'eel' that .*train lacks"):
        judging.held_out_source(session(config))


def test_without_held_out_images_a_run_goes_on(tmp_path, capsys):
    put(tmp_path, "1.png")
    assert judging.held_out_source(session(ImageConfig(data=DataConfig("folder", dir=str(tmp_path))))) is None
    assert "no held-out images, so no scores" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shape", "classes", "names", "known"),
    [
        ((32, 32, 3), 10, cifar.CLASSES, True),
        ((32, 32, 3), 10, (), True),
        ((32, 32, 3), 10, tuple("0123456789"), False),  # house numbers, say
        ((32, 32, 3), 11, (), False),
        ((8, 8, 1), 10, (), False),
    ],
)
def test_the_resnet_judges_cifar10_alone(tmp_path, monkeypatch, shape, classes, names, known):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "net.npz").write_bytes(b"")
    config = EvalConfig(judge="resnet", judge_weights="~/net.npz")
    source = from_arrays(np.zeros((1, *shape), np.uint8), np.zeros(1, int), num_classes=classes, class_names=names)
    if known:
        scores.check(config, source)
    else:
        with pytest.raises(UserError, match="judge=resnet knows CIFAR-10 alone"):
            scores.check(config, source)
    scores.check(EvalConfig(judge="mlp", judge_weights="~/net.npz"), source)


@pytest.mark.parametrize(
    ("judge", "classes", "said"),
    [
        ("resnet", 10, "no judge: --config.eval.judge_weights names no published ResNet (.npz)"),
        ("mlp", None, "no judge: the data have no labels"),
        ("mlp", 10, ""),
        ("none", None, ""),
    ],
)
def test_a_judge_that_cannot_be_is_told_by_the_check(capsys, judge, classes, said):
    """Which comes before the training; nobody is surprised after it."""
    labels = None if classes is None else np.zeros(1, int)
    source = from_arrays(np.zeros((1, 8, 8, 1), np.uint8), labels, num_classes=classes)
    judging.check(EvalConfig(judge=judge), source)
    line = capsys.readouterr().err
    assert line.startswith(said)
    assert line.count("\n") == bool(said)


def test_a_judge_is_fitted_to_a_share_of_a_large_set(monkeypatch):
    monkeypatch.setattr(judging, "FITTED", 64 * 100)
    seen = []
    monkeypatch.setattr(judging.judges, "fit_mlp", lambda name, x, labels, *test: seen.append((x, labels)))
    part = session(ImageConfig())
    judging.make_judge(part, part.source)
    ((x, labels),) = seen
    assert x.shape == (100, 8, 8, 1)
    assert len(np.unique(labels)) == 10


@pytest.mark.parametrize("shape", [(8, 8, 2), (8, 8), (2,)])
def test_a_network_is_built_for_pictures_alone(shape):
    with pytest.raises(UserError, match="needs images"):
        images.build(ImageConfig(), from_arrays(np.zeros((2, *shape), np.uint8)))

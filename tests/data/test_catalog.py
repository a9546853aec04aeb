"""From the name that a person types to a source."""

import gzip
import struct

import numpy as np
import pytest
from PIL import Image

from diffrl.data import cifar
from diffrl.data.catalog import DataConfig, make_source
from diffrl.errors import UserError


@pytest.mark.parametrize(
    ("config", "length", "shape", "classes"),
    [
        (DataConfig(), 1442, (8, 8, 1), 10),
        (DataConfig(split="test", image_size=16, channels=3), 355, (16, 16, 3), 10),
        (DataConfig("toy:moons"), 2**16, (2,), 2),
    ],
)
def test_bundled_sets(config, length, shape, classes):
    source = make_source(config)
    assert (source.length, source.shape, source.num_classes) == (length, shape, classes)
    assert source.fetch(np.arange(3))["x"].shape == (3, *shape)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("digit", "did you mean 'digits'"),
        ("cifar100", "did you mean 'cifar10'"),
        ("toy:moon", "did you mean 'toy:moons'"),
        ("tfds:", "did you mean 'tfds:NAME'"),
        ("", "choose one of digits, mnist"),
    ],
)
def test_unknown_names_get_the_nearest(name, hint):
    with pytest.raises(UserError, match=f"no data set '{name}': {hint}"):
        make_source(DataConfig(name))


def test_a_path_is_asked_for_and_may_come_from_the_environment(monkeypatch, tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "1.png")
    monkeypatch.delenv("DIFFRL_DATA_DIR", raising=False)
    with pytest.raises(UserError, match=r"'folder' needs a path: set --config.data.dir or DIFFRL_DATA_DIR"):
        make_source(DataConfig("folder"))
    monkeypatch.setenv("DIFFRL_DATA_DIR", str(tmp_path))
    assert make_source(DataConfig("folder")).length == 1
    with pytest.raises(UserError, match="no such folder: /nowhere"):
        make_source(DataConfig("folder", dir="/nowhere"))


def test_files_are_decoded_once_unless_the_cache_is_off(tmp_path):
    for i in range(3):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i}.png")
    kept, read = (make_source(DataConfig("folder", dir=str(tmp_path), cache_mb=mb)) for mb in (1, 0))
    kept.fetch(np.arange(3))
    (tmp_path / "1.png").unlink()
    np.testing.assert_array_equal(kept.fetch(np.array([2, 1]))["x"][:, 0, 0, 0], [2, 1])
    with pytest.raises(UserError, match=r"1.png"):
        read.fetch(np.array([2, 1]))


def test_mnist_comes_from_its_original_files(tmp_path):
    for stem, count in (("train", 3), ("t10k", 2)):
        images, labels = np.full((count, 28, 28), count, np.uint8), np.arange(count, dtype=np.uint8)
        for kind, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            (tmp_path / "mnist").mkdir(exist_ok=True)
            header = struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape)
            (tmp_path / "mnist" / f"{stem}-{kind}.gz").write_bytes(gzip.compress(header + array.tobytes()))
    for directory in (tmp_path, tmp_path / "mnist"):
        config = DataConfig("mnist", dir=str(directory), image_size=32)
        assert [make_source(config, split).length for split in (None, "test")] == [3, 2]
        assert make_source(config).fetch(np.arange(1))["x"].shape == (1, 32, 32, 1)


def test_cifar10_comes_from_an_archive_or_the_original_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    x = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    y = np.arange(20, dtype=np.uint8) % 10
    (tmp_path / "archive").mkdir()
    np.savez(tmp_path / "archive" / "cifar10.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    binary = tmp_path / "binary" / "cifar-10-batches-bin"
    binary.mkdir(parents=True)
    records = np.concatenate([y[:, None], x.transpose(0, 3, 1, 2).reshape(20, -1)], axis=1)
    for i, file in enumerate(cifar.FILES["train"]):
        (binary / file).write_bytes(records[4 * i : 4 * i + 4].tobytes())
    (binary / "test_batch.bin").write_bytes(records[:10].tobytes())
    for kind in ("archive", "archive/cifar10.npz", "binary"):
        for split, length in (("train", 20), ("test", 10)):
            source = make_source(DataConfig("cifar10", dir=f"~/{kind}"), split)
            batch = source.fetch(np.arange(source.length))
            np.testing.assert_array_equal(batch["x"], x[:length])
            np.testing.assert_array_equal(batch["label"], y[:length])
            assert source.class_names[3] == "cat"

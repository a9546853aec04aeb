"""Archives and original files: npz, idx (MNIST) and the CIFAR-10 binaries."""

import gzip
import hashlib
import io
import struct

import numpy as np
import pytest
from PIL import Image

from diffrl.data import cifar, mnist
from diffrl.data.npz import npz
from diffrl.errors import UserError

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (6, 4, 4), dtype=np.uint8)
Y = np.array([0, 1, 2, 0, 1, 2], np.uint8)


@pytest.mark.parametrize(
    ("keys", "split"),
    [
        (("x_test", "y_test"), "test"),
        (("test_images", "test_labels"), "test"),
        (("images", "labels"), "train"),
        (("arr_0", "arr_1"), "all"),
    ],
)
def test_npz_finds_the_keys_of_the_split(tmp_path, keys, split):
    decoys = {"x_train": X[:1], "y_train": Y[:1], "train_images": X[:1], "train_labels": Y[:1]}
    if split != "test":
        decoys = {}
    np.savez(tmp_path / "a.npz", **{keys[0]: X, keys[1]: Y[:, None]}, **decoys)
    source = npz(str(tmp_path / "a.npz"), split)
    batch = source.fetch(np.array([5, 1]))
    np.testing.assert_array_equal(batch["x"], X[[5, 1], ..., None])
    np.testing.assert_array_equal(batch["label"], [2, 1])
    assert (source.length, source.shape, source.num_classes) == (6, (4, 4, 1), 3)


@pytest.mark.parametrize(
    ("arrays", "split", "message"),
    [
        ({"pictures": X}, "train", "has no images: its keys are pictures; rename one to 'x'"),
        ({"x": X}, "test", "has no images: its keys are x"),
        ({"x": X, "y": Y[:5]}, "train", r"6 images but labels of shape \(5,\)"),
        ({"x": X, "y": Y.astype(int) - 1}, "train", r"a label -1 outside 0\.\.1"),
        ({"x": X[..., None] / 1.0}, "train", r"float images from .* to .*: scale them to -1\.\.1"),
        ({"x": np.full((2, 4, 4, 1), np.nan)}, "train", "float images from nan"),
        ({"x": X.astype(int)}, "train", "images of type int64: store uint8"),
        ({"x": np.array([{}, {}])}, "train", "cannot read .*a.npz"),
        ({"x": np.uint8(3)}, "train", "holds no examples"),
    ],
)
def test_npz_mistakes(tmp_path, arrays, split, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message) as error:
        npz(str(tmp_path / "a.npz"), split)
    assert "\n" not in str(error.value)


def array_file() -> bytes:
    file = io.BytesIO()
    np.save(file, X)
    return file.getvalue()


@pytest.mark.parametrize("content", [b"", array_file(), b"PK\x03\x04 and no more", b"plain text"])
def test_npz_that_is_none(tmp_path, content):
    with pytest.raises(UserError, match="no such file"):
        npz(str(tmp_path / "a.npz"))
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*; write it with numpy.savez"):
        npz(str(tmp_path / "a.npz"))


def test_floats_that_do_not_use_half_of_their_range_are_doubted(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", x=X / 255.0)
    assert npz(str(tmp_path / "a.npz")).length == 6
    assert "0 is taken as grey" in capsys.readouterr().err
    np.savez(tmp_path / "a.npz", x=X / 127.5 - 1)
    assert npz(str(tmp_path / "a.npz")).length == 6
    assert capsys.readouterr().err == ""


def test_points_and_floats_are_taken_as_they_are(tmp_path):
    points = RNG.standard_normal((6, 2))
    np.savez(tmp_path / "a.npz", x=points)
    np.testing.assert_array_equal(npz(str(tmp_path / "a.npz")).fetch(np.arange(6))["x"], points.astype(np.float32))


def write_idx(path, array):
    data = struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_compressed_or_not(tmp_path, suffix):
    assert not mnist.has_idx_files(str(tmp_path))
    for stem in ("train", "t10k"):
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte{suffix}", X)
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte{suffix}", Y)
    assert mnist.has_idx_files(str(tmp_path))
    batch = mnist.idx(str(tmp_path), "test").fetch(np.array([4, 2]))
    np.testing.assert_array_equal(batch["x"], X[[4, 2], ..., None])
    np.testing.assert_array_equal(batch["label"], [1, 2])


@pytest.mark.parametrize("damage", [lambda d: d[:30], lambda d: d[:2], lambda d: b"\1" + d, lambda d: b"\x1f\x8b" + d])
def test_damaged_idx_files(tmp_path, damage):
    file = tmp_path / "train-images-idx3-ubyte"
    write_idx(file, X)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"cannot read .*train-images-idx3-ubyte: .*; fetch the file again"):
        mnist.read_idx(file)
    with pytest.raises(UserError, match=r"cannot read .*missing"):
        mnist.read_idx(tmp_path / "missing")


def test_mnist_itself(data_dir):
    """Published facts: 60,000 and 10,000 images, a 5 first, the count of each digit, the mean pixel of 0.1307."""
    train, test = (mnist.idx(str(data_dir / "mnist"), split) for split in ("train", "test"))
    batch = train.fetch(np.arange(train.length))
    assert (train.length, test.length, train.shape, train.num_classes) == (60_000, 10_000, (28, 28, 1), 10)
    assert batch["label"][:5].tolist() == [5, 0, 4, 1, 9]
    counts = np.bincount(batch["label"]).tolist()
    assert counts == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert abs(batch["x"].mean() / 255 - 0.1307) < 5e-5


def test_cifar10_itself(data_dir, tmp_path):
    """The test split written in the original format has the published md5, and is read back as the images it was."""
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(data_dir / "cifar10" / "test_mosaic100.webp") as image:
        mosaic = np.asarray(image.convert("RGB"))
    x = mosaic.reshape(100, 32, 100, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)
    y = np.load(data_dir / "cifar10" / "test_labels.npy")
    records = np.concatenate([y[:, None].astype(np.uint8), x.transpose(0, 3, 1, 2).reshape(-1, 3072)], axis=1)
    assert hashlib.md5(records.tobytes()).hexdigest() == "803d5f7f4d78ea53de84dbe85f74fb6d"

    assert not cifar.has_binary_files(str(tmp_path))
    for file in cifar.FILES["test"] + cifar.FILES["train"]:
        (tmp_path / file).write_bytes(records[:100].tobytes())
    assert cifar.has_binary_files(str(tmp_path))
    batch = cifar.binary(str(tmp_path), "test").fetch(np.arange(100))
    np.testing.assert_array_equal(batch["x"], x[:100])
    np.testing.assert_array_equal(batch["label"], y[:100])
    assert cifar.binary(str(tmp_path)).length == 500

    (tmp_path / "data_batch_3.bin").write_bytes(records.tobytes()[:-1])
    with pytest.raises(UserError, match=r"data_batch_3.bin has .* bytes, not a multiple of 3073"):
        cifar.binary(str(tmp_path))

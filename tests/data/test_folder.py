"""Folders of images: classes, order, and each mistake in one line."""

import numpy as np
import pytest
from PIL import Image

from diffrl.data.folder import folder
from diffrl.errors import UserError


def put(path, value=0, size=(4, 4), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def test_subfolders_are_classes(tmp_path):
    put(tmp_path / "dog" / "b.png", 3)
    put(tmp_path / "dog" / "a.png", 2)
    put(tmp_path / "cat" / "deep" / "z.PNG", 1)
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / "notes.txt").write_text("not an image")
    source = folder(str(tmp_path))
    assert (source.length, source.shape, source.num_classes) == (3, (4, 4, 1), 2)
    assert source.class_names == ("cat", "dog")
    batch = source.fetch(np.array([2, 0, 1]))
    np.testing.assert_array_equal(batch["x"][:, 0, 0, 0], [3, 1, 2])
    np.testing.assert_array_equal(batch["label"], [1, 0, 1])


def test_a_flat_folder_has_no_labels(tmp_path):
    put(tmp_path / "1.png", "red", (8, 6), "RGB")
    put(tmp_path / "2.png", 255, (5, 9))
    source = folder(str(tmp_path), size=4, channels=3)
    batch = source.fetch(np.arange(2))
    assert set(batch) == {"x"}
    assert source.num_classes is None
    np.testing.assert_array_equal(batch["x"][:, 0, 0], [[255, 0, 0], [255, 255, 255]])


def test_splits_are_folders_where_there_are_any(tmp_path):
    for split, value in (("train", 1), ("test", 2)):
        put(tmp_path / split / "a" / "1.png", value)
        assert folder(str(tmp_path), split).fetch(np.array([0]))["x"].max() == value
    with pytest.raises(UserError, match="has no folder 'valid': make one"):
        folder(str(tmp_path), "valid")


@pytest.mark.parametrize(
    ("files", "split", "words"),
    [
        (["car/1", "train/1"], "train", "has the split 'train' beside 'car', which looks like a class"),
        (["train/cat/1", "dog/1"], "train", "beside 'dog'"),
        (["test/1", "val/1"], "train", "has no folder 'train', but 'test', which looks like a split"),
        (["train/cat/1", "test/cat/1"], "all", "has no folder 'all', but 'test'"),
        (["Train/cat/1", "Test/cat/1"], "train", "has no folder 'train', but 'Test'"),
    ],
)
def test_splits_and_classes_are_not_mixed_up(tmp_path, files, split, words):
    for name in files:
        put(tmp_path / f"{name}.png")
    assert words in message(lambda: folder(str(tmp_path), split))


def test_a_split_may_have_any_name_and_other_files_around_it(tmp_path):
    for name in ("train/cat/1", "train/test/1", "val/cat/1", "unseen/cat/1"):
        put(tmp_path / f"{name}.png")
    (tmp_path / "devkit").mkdir()
    (tmp_path / "devkit" / "readme.txt").write_text("not an image")
    assert folder(str(tmp_path)).class_names == ("cat", "test")
    assert folder(str(tmp_path), "unseen").class_names == ("cat",)


def message(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_and_empty_folders(tmp_path):
    assert f"no such folder: {tmp_path / 'x'}" in message(lambda: folder(str(tmp_path / "x")))
    assert f"no images in {tmp_path}" in message(lambda: folder(str(tmp_path)))
    (tmp_path / "cat").mkdir()
    assert f"no images in the class folder {tmp_path / 'cat'}" in message(lambda: folder(str(tmp_path)))


def test_images_beside_classes(tmp_path):
    put(tmp_path / "cat" / "1.png")
    put(tmp_path / "stray.png")
    assert "holds images (stray.png) beside folders (cat)" in message(lambda: folder(str(tmp_path)))


def test_an_unreadable_file_is_named(tmp_path):
    put(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(b"not a picture")
    source = folder(str(tmp_path))
    assert f"cannot read the image {tmp_path / '2.png'}" in message(lambda: source.fetch(np.arange(2)))


def test_a_file_of_another_shape_is_named(tmp_path):
    put(tmp_path / "1.png")
    put(tmp_path / "2.png", "red", mode="RGB")
    put(tmp_path / "3.png", size=(6, 4))
    source = folder(str(tmp_path))
    channels = message(lambda: source.fetch(np.array([1])))
    assert "2.png has 3 channels, the first image has 1: --config.data.channels=1 converts all" in channels
    size = message(lambda: source.fetch(np.array([2])))
    assert "3.png is 6x4, the first image 4x4: --config.data.image_size=4 crops and resizes all" in size
    np.testing.assert_array_equal(
        folder(str(tmp_path), size=4, channels=1).fetch(np.arange(3))["x"].shape, (3, 4, 4, 1)
    )
    assert "channels 2: choose 1" in message(lambda: folder(str(tmp_path), channels=2))

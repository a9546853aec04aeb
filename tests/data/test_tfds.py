"""tensorflow-datasets, read without TensorFlow, from a small set made by hand in the library's format."""

import hashlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffrl.data.catalog import DataConfig, make_source
from diffrl.data.tfds import tfds
from diffrl.errors import UserError

COUNT = 5


@pytest.fixture
def prepared(tmp_path):
    """A folder with the set "tiny": grey pictures of value 40 i, of sides 6, 6, 6, 6, 8 and labels 0, 1, 0, 1, -1."""
    import tensorflow_datasets as library
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_generated_pb2

    folder = tmp_path / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    writer = array_record_module.ArrayRecordWriter(
        str(folder / "tiny-train.array_record-00000-of-00001"), "group_size:1"
    )
    for i in range(COUNT):
        png = io.BytesIO()
        Image.new("L", (6 if i < 4 else 8,) * 2, 40 * i).save(png, "PNG")
        example = tf_example_generated_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(png.getvalue())
        example.features.feature["label"].int64_list.value.append(i % 2 if i < 4 else -1)
        writer.write(example.SerializeToString())
    writer.close()
    features = {
        "image": library.features.Image(shape=(None, None, 1)),
        "label": library.features.ClassLabel(names=["even", "odd"]),
    }
    library.features.FeaturesDict(features).save_config(folder)
    split = {
        "name": "train",
        "shardLengths": [str(COUNT)],
        "numBytes": "1",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path


def test_reads_images_and_labels(prepared):
    source = make_source(DataConfig("tfds:tiny", dir=str(prepared)))
    assert (source.length, source.shape, source.num_classes) == (COUNT, (6, 6, 1), 2)
    assert source.class_names == ("even", "odd")
    batch = source.fetch(np.array([3, 0, 2]))
    np.testing.assert_array_equal(batch["x"][:, 5, 5, 0], [120, 0, 80])
    np.testing.assert_array_equal(batch["label"], [1, 0, 0])


def test_slices_of_splits_sizes_and_channels(prepared):
    source = tfds("tiny", "train[1:3]", str(prepared), size=4, channels=3)
    assert source.shape == (4, 4, 3)
    np.testing.assert_array_equal(source.fetch(np.arange(2))["x"][:, 0, 0], [[40] * 3, [80] * 3])


def test_examples_that_do_not_fit_are_named(prepared):
    with pytest.raises(UserError, match=r"image 4 of tfds:tiny \(train\) has shape \(8, 8, 1\), .*image_size=6"):
        tfds("tiny", "train", str(prepared)).fetch(np.array([0, 4]))
    with pytest.raises(UserError, match=r"tfds:tiny \(train\) has a label -1 outside 0\.\.1"):
        tfds("tiny", "train", str(prepared), size=6).fetch(np.array([0, 4]))


def test_mistakes_are_one_line(prepared, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorflow" else found(name))

    def message(*args) -> str:
        with pytest.raises(UserError) as error:
            tfds(*args)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "Unknown split 'valid'. Should be one of ['train']" in message("tiny", "valid", str(prepared))
    assert "tensorflow-datasets has no set 'mnst': did you mean 'mnist'" in message("mnst", "train", str(prepared))
    missing = message("mnist", "train", str(prepared))
    assert f"tfds:mnist is not prepared in {prepared}: pip install -e '.[tfds]'" in missing
    assert "point --config.data.dir" in missing
    with pytest.raises(UserError, match=r"no train-images-idx3-ubyte.gz in .*, and tfds:mnist is not prepared"):
        make_source(DataConfig("mnist", dir=str(prepared)))


def test_another_file_format_is_refused(prepared):
    info = prepared / "tiny" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="is stored as tfrecord, which needs TensorFlow to read"):
        tfds("tiny", "train", str(prepared))


def test_sets_without_images_are_refused(prepared):
    import tensorflow_datasets as library

    features = {"label": library.features.ClassLabel(num_classes=2)}
    library.features.FeaturesDict(features).save_config(prepared / "tiny" / "1.0.0")
    with pytest.raises(UserError, match="tfds:tiny has no images, only label: choose an image set"):
        tfds("tiny", "train", str(prepared))


READ = """
import hashlib, importlib.machinery, sys
import numpy as np
if sys.argv[2] == "without":  # as if it were not installed, to the import system and to those who ask it
    finder = importlib.machinery.PathFinder
    find = finder.find_spec
    finder.find_spec = lambda name, *args: None if name == "tensorflow" else find(name, *args)
from diffrl.data.tfds import tfds
for split in ("train", "test"):
    source = tfds("mnist", split, sys.argv[1])
    batch = source.fetch(np.arange(source.length))
    rows = sorted(hashlib.md5(x.tobytes() + bytes([y])).hexdigest() for x, y in zip(batch["x"], batch["label"]))
    print(hashlib.md5("".join(rows).encode()).hexdigest())
assert ("tensorflow" in sys.modules) == (sys.argv[2] == "with")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="preparing a set needs TensorFlow: [tfds]")
def test_mnist_is_prepared_once_with_tensorflow_and_read_without(data_dir, tmp_path):
    """The original files, put where the library looks for files fetched by hand, pass its checksums."""
    from diffrl.data import mnist

    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    for file in (data_dir / "mnist").glob("*.gz"):
        shutil.copyfile(file, manual / file.name)

    def run(how: str) -> list[str]:
        command = [sys.executable, "-c", READ, str(tmp_path), how]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-2:]

    prepared, read = run("with"), run("without")
    for split, a, b in zip(("train", "test"), prepared, read, strict=True):
        source = mnist.idx(str(data_dir / "mnist"), split)
        batch = source.fetch(np.arange(source.length))
        pairs = zip(batch["x"], batch["label"], strict=True)
        rows = sorted(hashlib.md5(x.tobytes() + bytes([y])).hexdigest() for x, y in pairs)
        assert a == b == hashlib.md5("".join(rows).encode()).hexdigest()

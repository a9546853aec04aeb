"""The record of a run survives its crashes."""

import json
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from diffrl.errors import UserError
from diffrl.train.writers import Writers


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    """The TensorBoard events of a folder: records of (length, its checksum, bytes, their checksum)."""
    for file in sorted((folder / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_scalars_and_images_are_written(tmp_path):
    writers = Writers(tmp_path / "run")
    writers.scalars(3, {"loss": np.float32(0.5), "odd": float("nan")})
    assert lines(tmp_path / "run") == [{"step": 3, "loss": 0.5, "odd": None}]
    writers.images(3, "samples", np.zeros((4, 6, 3), np.uint8))
    writers.close()
    seen = {value.tag: (event, value) for event in events(tmp_path / "run") for value in event.summary.value}
    assert seen["loss"][0].step == 3
    assert seen["loss"][1].simple_value == 0.5
    image = seen["samples"][1].image
    assert (image.height, image.width) == (4, 6)


def test_cut_drops_what_came_later_and_half_a_line(tmp_path):
    writers = Writers(tmp_path)
    for step in (10, 20, 30):
        writers.scalars(step, {"loss": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 15, "lo')
    writers = Writers(tmp_path)
    writers.cut(20)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20]
    writers.scalars(30, {"loss": 0})
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30]


def test_a_record_without_a_checkpoint_is_kept_aside(tmp_path, capsys):
    """And bytes or steps that are none do not matter."""
    for number in (1, 2):
        writers = Writers(tmp_path)
        writers.scalars(0, {"loss": 9})
        writers.scalars(10, {"loss": number})
        (tmp_path / "metrics.jsonl").open("ab").write(b'{"step": "a"}\n\xff\n')
        before = (tmp_path / "metrics.jsonl").read_bytes()
        writers.cut(0)
        assert (tmp_path / f"metrics.{number}.jsonl").read_bytes() == before
        assert "the record of what was is kept" in capsys.readouterr().err
        assert {line["step"] for line in lines(tmp_path)} == {0}
    Writers(tmp_path).cut(0)
    assert len(list(tmp_path.glob("metrics*"))) == 3


def test_cut_tells_tensorboard_too(tmp_path):
    writers = Writers(tmp_path)
    writers.cut(20)
    writers.scalars(21, {"loss": 0})
    writers.close()
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [21]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/run: Not a directory; free space or choose"):
        Writers(tmp_path / "file" / "run")


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    writers = Writers(tmp_path / "run")
    writers.scalars(1, {"loss": 1})
    writers.images(1, "samples", np.zeros((2, 2, 3), np.uint8))
    writers.cut(0)
    writers.close()
    assert not (tmp_path / "run").exists()

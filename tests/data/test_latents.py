"""Encoded data on disk: what was encoded comes back, part by part, and only for what it was made of."""

import numpy as np
import pytest

from diffrl.data import latents
from diffrl.data.source import from_arrays
from diffrl.errors import UserError

ABOUT = {"autoencoder": "abc", "shape": (4, 4, 1)}
X = np.random.default_rng(0).integers(0, 256, (11, 4, 4, 1)).astype(np.uint8)
LABELS = np.arange(11) % 3


def source(labels=LABELS):
    return from_arrays(X, labels, num_classes=None if labels is None else 5, name="eleven")


def encode(x):
    """Left half and twice the right half, as two channels: mirrors are told apart."""
    assert x.shape == (4, 4, 4, 1)
    return np.concatenate([x[:, :, :2], 2 * x[:, :, 2:]], axis=-1)


def wanted():
    x = X.astype(np.float32) / 127.5 - 1
    return np.concatenate([x[:, :, :2], 2 * x[:, :, 2:]], axis=-1)


@pytest.mark.parametrize("in_memory", [2**20, 0])
def test_round_trip(tmp_path, in_memory):
    latents.write(tmp_path, source(), encode, ABOUT, batch=4)
    found = latents.read(tmp_path, ABOUT, in_memory)
    assert (found.length, found.shape, found.num_classes, found.in_memory) == (11, (4, 2, 2), 5, in_memory > 0)
    batch = found.fetch(np.array([10, 0, 3]))
    np.testing.assert_allclose(batch["x"], wanted()[[10, 0, 3]], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(batch["label"], LABELS[[10, 0, 3]])


def test_processes_write_parts_and_mirrors_follow(tmp_path):
    for index in range(3):
        if index == 1:
            with pytest.raises(UserError, match="holds no latents"):
                latents.read(tmp_path, ABOUT)  # two parts are missing
        latents.write(tmp_path, source(None), encode, ABOUT, batch=4, mirror=True, process_index=index, process_count=3)
    found = latents.read(tmp_path, ABOUT)
    assert found.length == 22
    assert found.num_classes is None
    x = found.fetch(np.arange(22))["x"]
    np.testing.assert_allclose(x[:11], wanted(), rtol=1e-3, atol=1e-3)
    mirrored = (X[:, :, ::-1].astype(np.float32) / 127.5 - 1)[:, :, :2]
    np.testing.assert_allclose(x[11:, ..., :1], mirrored, rtol=1e-3, atol=1e-3)


def test_encoded_once(tmp_path):
    latents.write(tmp_path, source(), encode, ABOUT, batch=4)

    def never(x):
        raise AssertionError("encoded again")

    latents.write(tmp_path, source(), never, ABOUT, batch=4)
    with pytest.raises(AssertionError, match="again"):
        latents.write(tmp_path, source(), never, ABOUT | {"autoencoder": "other"}, batch=4)


def test_an_interrupted_cache_is_none(tmp_path):
    calls = []

    def dies(x):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(x)

    with pytest.raises(KeyboardInterrupt):
        latents.write(tmp_path, source(), dies, ABOUT, batch=4)
    with pytest.raises(UserError, match="encode them first"):
        latents.read(tmp_path, ABOUT)
    latents.write(tmp_path, source(), encode, ABOUT, batch=4)
    assert latents.read(tmp_path, ABOUT).length == 11
    assert not list(tmp_path.glob("*.partial"))


def test_overflow_is_named(tmp_path):
    with pytest.raises(UserError, match="beyond float16"):
        latents.write(tmp_path, source(), lambda x: 1e5 * encode(x), ABOUT, batch=4)

"""Results survive what interrupts their writing."""

import json

import numpy as np
import pytest

from diffrl.recipes import results


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    results.save(path, {"rows": [1.5, np.float32(2.5)]})
    before = path.read_bytes()
    assert json.loads(before) == {"rows": [1.5, 2.5]}

    def interrupted():
        with results.whole(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(TypeError):
        results.save(path, {"rows": object()})
    assert path.read_bytes() == before
    results.save(path, {})
    assert json.loads(path.read_text()) == {}


def test_the_first_process_alone_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    results.save(tmp_path / "results.json", {})
    assert not list(tmp_path.iterdir())

"""A checkpoint comes back bit for bit, or the one before it does, loudly."""

import errno
import fcntl
import functools
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from diffrl.errors import UserError
from diffrl.train import lock, mesh
from diffrl.train.checkpoint import Checkpoints
from diffrl.train.loop import resume

N_FILES = 12  # what one checkpoint of the toy holds, at least


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints")
    yield made
    made.close()


def state_at(n):
    state = toy.fresh()
    return state._replace(
        step=jnp.int32(n),
        params=jax.tree.map(lambda p: p + n, state.params),
        frozen={"half": jnp.full(3, n, jnp.bfloat16)},
        extra={
            "keys": jax.random.split(jax.random.key(n), 4),
            "none": None,
            "flags": jnp.array([True, False]),
            "empty": jnp.zeros((0, 3), jnp.bfloat16),  # as contacts are in a world where nothing can touch
        },
    )


def save_and_wait(checkpoints, n, state):
    checkpoints.save(n, state, {"place": n})
    checkpoints.wait()


def names(checkpoints):
    """What lies in the folder, beside the lock."""
    return sorted(path.name for path in checkpoints.folder.iterdir() if path.name != lock.LOCK)


def save(checkpoints, *steps):
    for n in steps:
        save_and_wait(checkpoints, n, state_at(n))


def test_round_trip(checkpoints):
    assert checkpoints.restore(state_at(0)) is None
    save(checkpoints, 3, 7)
    state, position = checkpoints.restore(state_at(0))
    toy.assert_same(state, state_at(7))
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, state_at(7))
    assert position == {"place": 7}


def test_restores_into_shapes_alone(checkpoints):
    save(checkpoints, 1)
    state, _ = checkpoints.restore(jax.eval_shape(lambda: state_at(0)))
    toy.assert_same(state, state_at(1))
    jax.random.normal(state.key, (2,))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1)])
def test_restores_onto_other_devices(checkpoints, sizes):
    place = functools.partial(mesh.place, small=toy.SMALL)
    checkpoints.save(1, place(mesh.make_mesh(data=2, fsdp=4), state_at(1)))
    like = place(mesh.make_mesh(*sizes), state_at(0))
    state, _ = checkpoints.restore(like)
    toy.assert_same(state, state_at(1))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, state, like))


def test_the_state_may_be_donated_while_it_is_written(checkpoints):
    forward = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = toy.fresh()._replace(frozen=jnp.zeros(2_000_000))
    for n in range(5):
        checkpoints.save(n, state)
        for _ in range(5):
            state = state._replace(frozen=forward(state.frozen))
        checkpoints.wait()
        saved, _ = checkpoints.restore(state)
        assert np.unique(saved.frozen) == [5 * n]


def test_keeps_the_newest(checkpoints):
    save(checkpoints, 1, 2, 10, 11)
    assert checkpoints.steps() == [2, 10, 11]
    assert names(checkpoints) == ["10", "11", "2"]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("hurt", [truncate, flip, lambda path: path.unlink()], ids=["truncated", "flipped", "deleted"])
def test_every_damaged_file_is_noticed(checkpoints, hurt, capsys):
    """Each file in turn is damaged in the newest checkpoint: the one before comes back, nothing is deleted."""
    save(checkpoints, 1, 2)
    newest = checkpoints.folder / "2"
    whole = checkpoints.folder.parent / "whole"
    shutil.copytree(newest, whole)
    files = [path.relative_to(newest) for path in sorted(newest.rglob("*")) if path.is_file()]
    assert len(files) >= N_FILES
    for file in files:
        hurt(newest / file)
        remains = len([path for path in newest.rglob("*") if path.is_file()])
        state, position = checkpoints.restore(state_at(0))
        assert (int(state.step), position) == (1, {"place": 1})
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert str(newest) in said
        (aside,) = [checkpoints.folder / name for name in names(checkpoints) if name != "1"]
        assert len([path for path in aside.rglob("*") if path.is_file()]) == remains
        shutil.rmtree(aside)
        shutil.copytree(whole, newest)
    toy.assert_same(checkpoints.restore(state_at(0))[0], state_at(2))


def test_several_damaged_ones_stay_aside(checkpoints, capsys):
    for _ in range(2):
        save(checkpoints, 1)
        flip(checkpoints.folder / "1" / "contents.json")
        assert checkpoints.restore(state_at(0)) is None
    assert names(checkpoints) == ["1.corrupt", "1.corrupt+"]


def test_an_interrupted_save_is_replaced(checkpoints, capsys):
    save(checkpoints, 1)
    left = checkpoints.folder / "2" / "state.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    (left / "part").write_text("half")
    _, position = checkpoints.restore(state_at(0))
    assert position == {"place": 1}
    assert "was never finished" in capsys.readouterr().err
    save(checkpoints, 2)
    assert checkpoints.restore(state_at(0))[1] == {"place": 2}


def test_another_model_is_not_corruption(checkpoints):
    save(checkpoints, 1)
    other = state_at(0)
    other.params["a"], other.params["new"] = jnp.zeros((3, 4)), jnp.zeros(2)
    with pytest.raises(UserError) as error:
        checkpoints.restore(other)
    line = str(error.value)
    assert "params/a is float32[16, 32] there and float32[3, 4] here" in line
    assert "params/new is absent there and float32[2] here" in line
    assert "\n" not in line
    assert checkpoints.steps() == [1]


def test_saving_a_step_twice_is_refused(checkpoints):
    save(checkpoints, 1)
    with pytest.raises(UserError, match="exists already: resume"):
        checkpoints.save(1, state_at(1))


def test_full_disk_is_seen_beforehand(checkpoints, monkeypatch, capfd):
    save(checkpoints, 1)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(toy.host(state_at(2))))
    usage = shutil.disk_usage(checkpoints.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
    with pytest.raises(UserError, match=r"cannot save .*/2: No space left on device; .*kept checkpoints: 1\)"):
        checkpoints.save(2, state_at(2))
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))
    save(checkpoints, 2)


def test_a_refused_write_is_one_line_and_keeps_what_was_there(checkpoints, capfd):
    save(checkpoints, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = jnp.asarray(np.random.default_rng(0).normal(size=200_000), jnp.float32)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot save .*/2: .*kept checkpoints: 1\)") as error:
            save_and_wait(checkpoints, 2, state_at(2)._replace(frozen=noise))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert "Traceback" not in capfd.readouterr().err
    assert not (checkpoints.folder / "2").exists()
    like = state_at(0)
    toy.assert_same(checkpoints.restore(like)[0], state_at(1))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make .*/file/checkpoints: Not a directory; choose another --workdir"):
        Checkpoints(tmp_path / "file" / "checkpoints")
    with pytest.raises(UserError, match="keep at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_positions_must_be_json(checkpoints):
    with pytest.raises(TypeError, match="JSON"):
        checkpoints.save(1, state_at(1), {"place": object()})


def test_a_second_writer_is_refused_and_a_reader_is_not(checkpoints):
    save(checkpoints, 1)
    other = Checkpoints(checkpoints.folder)
    (checkpoints.folder / "2").mkdir()  # as if the first were at it
    with pytest.raises(UserError) as error:
        other.save(2, state_at(2))
    assert f"another run saves to {checkpoints.folder} (process {os.getpid()} on " in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="another run saves to"):
        resume(other, state_at(0))
    assert names(checkpoints) == ["1", "2"]
    assert other.restore(state_at(0))[1] == {"place": 1}
    checkpoints.close()
    save(other, 2)
    other.close()


def test_a_file_system_without_locks_is_no_obstacle(checkpoints, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    save(checkpoints, 1)
    assert checkpoints.steps() == [1]

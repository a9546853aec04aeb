"""Devices change how a step runs, not what it computes."""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import PartitionSpec as P

from diffrl.errors import UserError
from diffrl.train import mesh
from diffrl.train.step import global_step

STEPS = 20


def train(devices, call, put):
    state = mesh.place(devices, toy.fresh(), toy.SMALL)
    for n in range(STEPS):
        state, metrics = call(state, put(toy.batch(n)))
    return toy.host((state, metrics))


def over(devices, form, **options):
    """`form` turns make_update and the mesh into a step; trains with it over the devices."""
    step = form(toy.make_update(**options), devices)
    call = mesh.compile_step(step, devices, toy.fresh(), small=toy.SMALL)
    return train(devices, call, mesh.put_batch(devices))


def by_jit(make_update, _):
    return global_step(make_update())


def line(n):
    return mesh.make_mesh(devices=jax.devices()[:n])


@pytest.fixture(scope="module")
def alone():
    return over(line(1), by_jit)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_same_training_on_n_devices(alone, n):
    toy.assert_close(over(line(n), by_jit), alone, 1e-5)


@pytest.mark.parametrize("sizes", [(2, 4, 1), (1, 8, 1), (2, 2, 2)])
def test_same_training_on_other_meshes(alone, sizes):
    toy.assert_close(over(mesh.make_mesh(*sizes), by_jit), alone, 1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_shard_map_agrees(alone, accumulate):
    toy.assert_close(over(mesh.make_mesh(), mesh.shard_map_step, accumulate=accumulate), alone, 1e-6)


def test_pmap_agrees(alone):
    step = mesh.pmap_step(toy.make_update(), jax.devices())
    toy.assert_close(train(mesh.make_mesh(), step, lambda batch: batch), alone, 1e-6)


def test_shards_draw_different_noise():
    """The oracle behind the agreement: with one key for all shards the mapped step would take another path."""
    state = toy.fresh()
    update = functools.partial(jax.jit(toy.make_update()()), state, toy.batch(0))
    keys = jax.random.split(jax.random.key(0), toy.B)
    repeated = jnp.tile(keys[: toy.B // 8], 8)
    assert abs(update(keys)[1]["loss"] - update(repeated)[1]["loss"]) > 1e-3


def test_accumulation_moves_no_samples():
    """Microbatches are dealt so that every device keeps its own samples: the only collective is the sum."""
    devices = mesh.make_mesh()
    call = mesh.compile_step(global_step(toy.make_update(accumulate=4)()), devices, toy.fresh())
    program = call.lower(toy.fresh(), toy.batch(0)).compile().as_text()
    found = set(re.findall(r"\b(all-\w+|collective-permute|reduce-scatter)(?:-start)?\(", program))
    assert found == {"all-reduce"}


def test_big_leaves_are_split_and_small_ones_are_not():
    devices = mesh.make_mesh(data=2, fsdp=4)
    leaves = {
        "wide": jnp.zeros((6, 40)),
        "odd": jnp.zeros((15, 17)),
        "small": jnp.zeros((8, 8)),
        "tall": jnp.zeros((80, 40)),
    }
    specs = {name: s.spec for name, s in mesh.state_sharding(devices, leaves, small=100).items()}
    assert specs == {"wide": P(None, "fsdp"), "odd": P(), "small": P(), "tall": P("fsdp")}


def test_state_memory_is_split_and_donated():
    devices = mesh.make_mesh(data=2, fsdp=4)
    source = toy.fresh()
    state = mesh.place(devices, source, small=toy.SMALL)
    (moment,) = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (toy.D, 2 * toy.D)][:1]
    assert {shard.data.shape for shard in moment.addressable_shards} == {(toy.D, 2 * toy.D // 4)}
    call = mesh.compile_step(global_step(toy.make_update()()), devices, source, small=toy.SMALL)
    call(state, mesh.put_batch(devices)(toy.batch(0)))
    assert state.params["a"].is_deleted()
    assert not source.params["a"].is_deleted()


def test_repeated_steps_are_single_ones():
    """In one call on batches [k, B, ...], split over the devices, exactly what k calls give, the metrics stacked."""
    devices, one = mesh.make_mesh(data=4, fsdp=2), global_step(toy.make_update()())
    place = functools.partial(mesh.place, devices, small=toy.SMALL)
    single, many = (mesh.compile_repeated(one, devices, toy.fresh(), k, small=toy.SMALL) for k in (1, 3))
    state, rows = place(toy.fresh()), []
    for n in range(3):
        state, metrics = single(state, mesh.put_batch(devices)(toy.batch(n)))
        rows.append(metrics)
    stacked = {"x": np.stack([toy.batch(n)["x"] for n in range(3)])}
    repeated, metrics = many(place(toy.fresh()), mesh.put_batch(devices, inner=True)(stacked))
    toy.assert_same(repeated, state)
    toy.assert_same(metrics, jax.tree.map(lambda *m: jnp.stack(m), *rows))


def test_put_batch_splits_the_samples():
    devices = mesh.make_mesh(data=4, fsdp=2)
    put = mesh.put_batch(devices)(toy.batch(0))
    np.testing.assert_array_equal(put["x"], toy.batch(0)["x"])
    assert {shard.data.shape for shard in put["x"].addressable_shards} == {(toy.B // 8, toy.D)}
    stacked = mesh.put_batch(devices, inner=True)({"x": np.zeros((3, 16, 2), np.float32)})
    assert {shard.data.shape for shard in stacked["x"].addressable_shards} == {(3, 2, 2)}


def test_indivisible_batches_are_refused():
    with pytest.raises(UserError, match="a batch of 12 cannot be split over 8 devices"):
        mesh.put_batch(mesh.make_mesh())(toy.batch(0, size=12))
    with pytest.raises(UserError, match="a batch of 6 cannot be split over 4 devices"):
        mesh.put_batch(line(4), inner=True)({"x": np.zeros((8, 6, 2))})
    with pytest.raises(UserError, match="a batch of 12 cannot be split over 8 devices"):
        mesh.pmap_step(toy.make_update())(toy.fresh(), toy.batch(0, size=12))


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (16, 1, 1), (-1, 0, 1)])
def test_meshes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        mesh.make_mesh(*sizes)


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables that say who else is there; without them nobody is."""
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "DIFFRL_DISTRIBUTED", "JAX_COORDINATOR", "JAX_NUM_PROC", "JAX_PROCESS")):
            monkeypatch.delenv(name)
    return lambda env: [monkeypatch.setenv(name, value) for name, value in env.items()]


@pytest.mark.parametrize(
    ("env", "call"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1"}, None),
        ({"DIFFRL_DISTRIBUTED": "1"}, (None, None, None)),
        ({"DIFFRL_DISTRIBUTED": "", "SLURM_NTASKS": "", "JAX_COORDINATOR_ADDRESS": ""}, None),
        ({"SLURM_NTASKS": "4"}, (None, None, None)),
        ({"SLURM_NTASKS": "4", "DIFFRL_DISTRIBUTED": ""}, (None, None, None)),
        ({"SLURM_NTASKS": "4", "DIFFRL_DISTRIBUTED": "0"}, None),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            ("host:1", 2, 0),
        ),
    ],
)
def test_processes_join_when_the_environment_says_so(monkeypatch, environment, env, call):
    environment(env)
    calls = []
    monkeypatch.setattr(
        jax.distributed,
        "initialize",
        lambda address, num_processes, process_id: calls.append((address, num_processes, process_id)),
    )
    mesh.init_distributed()
    assert calls == ([] if call is None else [call])


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"SLURM_NTASKS": "four"}, "SLURM_NTASKS=four: expected a number"),
        ({"DIFFRL_DISTRIBUTED": "yes"}, "DIFFRL_DISTRIBUTED=yes: expected a number"),
        ({"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "-2"}, "JAX_NUM_PROCESSES=-2: expected a number"),
    ],
)
def test_mistakes_in_the_environment_are_one_line(environment, env, says):
    environment(env)
    with pytest.raises(UserError, match=f"^{says}.*$") as error:
        mesh.init_distributed()
    assert "\n" not in str(error.value)

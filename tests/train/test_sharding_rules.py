"""Every array lies where the table says, and no layout changes what is computed."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
import toy
from tiny_networks import DIT, OPTIMIZER, SMALL, UNET, Problem, grid, named, params, shapes

from diffrl.nets.dit import SIZES, DiT
from diffrl.nets.unet import UNet
from diffrl.train import mesh, rules
from diffrl.train.checkpoint import Checkpoints
from diffrl.train.state import create

XL = DiT(8, *SIZES["XL"], num_classes=1000)
DDPM = UNet(3, heads=4, num_classes=10)
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]


USUAL = [
    (XL, 32, 4),
    (dataclasses.replace(XL, scan=False), 32, 4),
    (dataclasses.replace(XL, conditioning="cross"), 32, 4),
    (DDPM, 32, 3),
]


@functools.cache
def arrays(net, side, channels):
    return dict(named(shapes(net, side, channels)))


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    [
        ("blocks/qkv/kernel", (28, 1152, 3, 16, 72), (None, "fsdp", None, "tensor")),
        ("opt_state/1/mu/blocks/qkv/kernel", (28, 1152, 3, 16, 72), (None, "fsdp", None, "tensor")),
        ("ema/block_3/qkv/kernel", (1152, 3, 16, 72), ("fsdp", None, "tensor")),
        ("blocks/qkv/bias", (28, 3, 16, 72), (None, None, "tensor", "fsdp")),
        ("blocks/attention_out/kernel", (28, 1152, 1152), (None, "tensor", "fsdp")),
        ("blocks/cross_q/kernel", (28, 1152, 16, 72), (None, "fsdp", "tensor")),
        ("blocks/cross_kv/kernel", (28, 1152, 2, 16, 72), (None, "fsdp", None, "tensor")),
        ("blocks/mlp_0/kernel", (28, 1152, 4608), (None, "fsdp", "tensor")),
        ("blocks/mlp_0/bias", (28, 4608), (None, "tensor")),
        ("blocks/mlp_1/kernel", (28, 4608, 1152), (None, "tensor", "fsdp")),
        ("blocks/modulation/kernel", (28, 1152, 6912), (None, None, "fsdp")),
        ("label_embedding/table", (1001, 1152), (None, "fsdp")),
        ("out/kernel", (1152, 32), ("fsdp",)),
        ("down_0_block_0/conv_0/kernel", (3, 3, 128, 128), (None, None, "fsdp", "tensor")),
        ("down_0_block_0/conv_1/kernel", (3, 3, 3, 128, 128), (None, None, None, "tensor", "fsdp")),
        ("down_0_block_0/shortcut/kernel", (128, 256), (None, "fsdp")),
        ("mid_attention/qkv/kernel", (256, 3, 4, 64), ("fsdp", None, "tensor")),
        ("mid_attention/out/kernel", (256, 256), ("tensor", "fsdp")),
        # What the mesh does not divide stays whole, and "fsdp" goes elsewhere.
        ("mid_attention/qkv/kernel", (256, 3, 1, 256), ("fsdp",)),
        ("mid_attention/qkv/kernel", (250, 3, 4, 64), (None, None, "tensor", "fsdp")),
        ("mlp_0/kernel", (1150, 4608), (None, "tensor")),
        ("mlp_0/kernel", (1151, 4609), ()),
        # The axis of the stack is never split, nor mistaken for one of the row's.
        ("blocks/anything", (64, 7, 9), ()),
        ("opt_state/v_row/blocks/mlp_0/kernel", (64, 1152), (None, "fsdp")),
        ("blocks/scale", (64,), ()),
        ("step", (), ()),
    ],
)
def test_axes_by_hand(path, shape, axes):
    assert rules.axes(path, shape, {"fsdp": 8, "tensor": 2}) == axes


def test_every_large_array_is_split_and_no_stack_is():
    leaves = [pair for usual in USUAL for pair in arrays(*usual).items()]
    for path, leaf in (pair for pair in leaves if pair[1].size > mesh.SMALL):
        axes = rules.axes(path, leaf.shape, {"fsdp": 8, "tensor": 1})
        assert axes.count("fsdp") == 1, path
        assert not path.startswith("blocks/") or axes[0] is None, path


def test_no_row_is_dead():
    """Each is the first that fits some array.  Small ones count: biases are large only where they are stacked."""
    paths = {path for net, side, channels in USUAL for path in arrays(net, side, channels)}
    rows = [row for row, _ in rules.RULES]
    first = {next((row for row in rows if re.search(f"(^|/)({row})$", path)), None) for path in paths}
    assert first >= set(rows)


@pytest.mark.parametrize("net", [DIT, dataclasses.replace(DIT, scan=False), UNET], ids=["dit", "unrolled", "unet"])
def test_tensor_splits_the_work(net):
    """Shards' shapes: half the heads, half the hidden channels; moments and averages lie as their parameters do."""
    state = mesh.place(grid(2, 2, 2), Problem(net).state(), SMALL)
    parts = {path: (leaf.shape, leaf.addressable_shards[0].data.shape) for path, leaf in named(state.params)}
    for end, axis in [
        ("qkv/kernel", -2),
        ("mlp_0/kernel", -1),
        ("mlp_1/kernel", -2),
        ("conv_0/kernel", -1),
        ("conv_1/kernel", -2),
    ]:
        for whole, part in (sizes for path, sizes in parts.items() if path.endswith(end)):
            assert part[axis] == whole[axis] // 2
    layout = [leaf.sharding for leaf in jax.tree.leaves(state.params)]
    adam = state.opt_state[1]
    for other in (state.ema, adam.mu, adam.nu):
        assert [leaf.sharding for leaf in jax.tree.leaves(other)] == layout


@functools.cache
def trained(net, sizes, accumulate=1, steps=4):
    problem, devices = Problem(net), grid(*sizes)
    state = mesh.place(devices, problem.state(), SMALL)
    call, losses = mesh.compile_step(problem.step(accumulate=accumulate), devices, state, small=SMALL), []
    for n in range(steps):
        state, metrics = call(state, mesh.put_batch(devices)(problem.batch(n)))
        losses.append(metrics["loss"])
    return toy.host((state, losses))


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("net", [DIT, pytest.param(UNET, marks=pytest.mark.long)], ids=["dit", "unet"])
def test_same_training_on_every_mesh(net, sizes):
    alone = trained(net, (1, 1, 1))
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (alone[0].params, params(net))), strict=True)]
    assert np.mean(np.array(moved) > 1e-3) > 0.9  # there was something to agree on
    toy.assert_close(trained(net, sizes), alone, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_same_training_from_microbatches(sizes):
    toy.assert_close(trained(DIT, sizes, accumulate=2), trained(DIT, (1, 1, 1)), 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_a_state_made_in_parts_is_the_whole_one(impl):
    def make():
        key = jax.random.key(7)
        fast = jax.random.key(jax.random.bits(key), impl=impl)
        x = np.zeros((1, 8, 8, 3), np.float32)
        return create(DIT.init(fast, x, np.zeros(1))["params"], OPTIMIZER, key)

    alone = jax.jit(make)()
    for sizes in MESHES:
        devices = grid(*sizes)
        state, like = mesh.initialise(devices, make, SMALL), mesh.abstract(devices, make, SMALL)
        toy.assert_same(state, alone)
        assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, state, like))


def test_no_device_makes_more_than_its_part():
    """The program that makes the state puts out an eighth of it, and needs little beside."""
    devices = grid(1, 8, 1)
    like = mesh.abstract(devices, Problem(DIT).fresh, SMALL)
    call = jax.jit(Problem(DIT).fresh, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like))
    memory = call.lower().compile().memory_analysis()
    assert memory.output_size_in_bytes < 0.15 * sum(4 * leaf.size for leaf in jax.tree.leaves(like))


def test_a_checkpoint_moves_between_meshes(tmp_path):
    problem = Problem(DIT)
    source = mesh.place(grid(1, 8, 1), problem.state(), SMALL)
    call = mesh.compile_step(problem.step(), grid(1, 8, 1), source, small=SMALL)
    source, _ = call(source, mesh.put_batch(grid(1, 8, 1))(problem.batch(0)))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, source)
    for sizes in [(2, 2, 2), (1, 1, 1)]:
        like = mesh.abstract(grid(*sizes), problem.fresh, SMALL)
        state, _ = checkpoints.restore(like)
        toy.assert_same(state, source)
        assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, state, like))
    checkpoints.close()

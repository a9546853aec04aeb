"""What devices send one another and what they hold, read off the compiled step, is what the table of axes predicts."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from collectives import collectives, total
from tiny_networks import BATCH, DIT, SIDE, UNET, Problem, grid, named

from diffrl.nets.dit import SIZES, DiT
from diffrl.train import mesh

SCALARS = 512  # bytes of the loss and of each leaf's part in the gradient's norm


def size_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def found_on(sizes, net=DIT, **options):
    program, like = Problem(net).compiled(grid(*sizes), **options)
    return collectives(program), like.params


def test_data_parallel_sums_each_gradient_once():
    found, params = found_on((8, 1, 1))
    assert {each.kind for each in found} == {"all-reduce"}
    assert 0 <= total(found) - size_of(params) <= SCALARS


def gathers(path, remat):
    """How often a step puts a split leaf together: once in the forward pass, again where the backward pass reads it."""
    if remat == "full" and path.startswith("blocks/"):
        return 2
    first = path.startswith(("patch/", "time_embedding/dense_0/", "label_embedding/"))  # nothing is trained below
    return 2 if path.endswith("kernel") and not first else 1


@pytest.mark.parametrize("remat", ["none", "full"])
def test_fsdp_gathers_a_layer_at_a_time(remat):
    """Each split parameter, and nothing else: activations stay where they are.  Blocks are put together one by one."""
    found, params = found_on((1, 8, 1), dataclasses.replace(DIT, remat=remat))
    assert {each.kind for each in found} == {"all-reduce", "all-gather"}
    split = [(path, leaf) for path, leaf in named(params) if "fsdp" in leaf.sharding.spec]
    assert total(found, "all-gather") == sum(gathers(path, remat) * size_of(leaf) for path, leaf in split)
    assert 0 <= total(found, "all-reduce") - size_of(params) <= SCALARS
    largest = max(size_of(leaf) // (DIT.depth if path.startswith("blocks/") else 1) for path, leaf in split)
    assert max(each.bytes // each.times for each in found if each.kind == "all-gather") == largest


def test_tensor_sums_two_activations_a_block_each_way():
    """After attention and after the MLP; their gradients at the other ends (Shoeybi et al., figure 4)."""
    found, _ = found_on((1, 1, 8))
    assert {each.kind for each in found} == {"all-reduce"}
    tokens = 4 * BATCH * (SIDE // DIT.patch) ** 2 * DIT.width
    assert 0 <= total(found) - 4 * DIT.depth * tokens <= SCALARS


def test_all_three_together():
    found, params = found_on((2, 2, 2))
    assert {each.kind for each in found} == {"all-reduce", "all-gather"}
    assert total(found, "all-gather") < 2 * size_of(params)


@pytest.mark.long
def test_the_unet_sends_parameters_only():
    found, params = found_on((1, 8, 1), UNET)
    assert {each.kind for each in found} == {"all-reduce", "all-gather"}
    assert size_of(params) < total(found, "all-gather") < 2 * size_of(params)
    assert 0 <= total(found, "all-reduce") - size_of(params) <= 4 * SCALARS


@pytest.mark.long
def test_microbatches_gather_each_time_and_keep_their_samples():
    once, twice = (found_on((1, 8, 1), accumulate=n)[0] for n in (1, 2))
    assert {each.kind for each in twice} == {"all-reduce", "all-gather"}
    # XLA may take a gather that is the same for all microbatches out of their loop.
    assert total(once, "all-gather") < total(twice, "all-gather") <= 2 * total(once, "all-gather")


@pytest.mark.long
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_state_of_675_million_fits_eighths(dtype):
    """DiT-XL/2 on 8 devices, one sample each, compiled and never run: an eighth of the state, no more than a quarter of
    one device's working memory for the whole batch."""
    net = DiT(8, *SIZES["XL"], num_classes=1000, remat="full", dtype=dtype)
    problem = Problem(net, side=32, channels=4)
    (many, like), (one, _) = (problem.compiled(grid(1, n, 1), 8, mesh.SMALL) for n in (8, 1))
    whole, memory = size_of((like.params, like.ema, like.opt_state)), many.memory_analysis()
    assert sum(leaf.size for leaf in jax.tree.leaves(like.params)) == pytest.approx(675e6, rel=1e-3)
    assert memory.argument_size_in_bytes == pytest.approx(whole / 8, rel=0.01)
    assert memory.temp_size_in_bytes < one.memory_analysis().temp_size_in_bytes / 4

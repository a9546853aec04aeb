"""The real network trains and samples the same on any number of devices, to the order of its sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from diffrl.data.digits import digits
from diffrl.data.pipeline import loader
from diffrl.diffusion.sampling import Sampler, normal, sample, start
from diffrl.recipes import denoising, images, networks
from diffrl.train import mesh, optim
from diffrl.train.state import create
from diffrl.train.step import global_step, make_update

STEPS, BATCH = 20, 8
CONFIG = images.ImageConfig(
    unet=networks.UNetConfig(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), groups=4),
    optim=optim.OptimConfig(learning_rate=1e-3, warmup_steps=5),
    sample=denoising.SampleConfig(sampler="ancestral", steps=5, guidance=1.5),
)


@functools.cache
def model():
    return images.build(CONFIG, digits("train"))


def params():
    """Random everywhere: the initialisers' zeros would hide most of the network."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(model().init, jax.random.key(0))

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(max(leaf.size // leaf.shape[-1], 9)), leaf.dtype)

    return jax.tree.map(draw, shapes)


def line(n):
    return mesh.make_mesh(devices=jax.devices()[:n])


@functools.cache
def batches():
    data = loader(digits("train"), BATCH, seed=0)
    found = [next(data) for _ in range(STEPS)]
    data.close()
    return found


def by_jit(update, _):
    return global_step(update())


def train(n, form):
    """The state after 20 steps of `form`, a step made of an update and a mesh, on n devices."""
    loss = denoising.make_loss(model().diffusion, model().apply, model().num_classes, 0.1)
    optimizer, devices = optim.make(CONFIG.optim, STEPS), line(n)
    update = functools.partial(make_update, loss, optimizer)
    state = mesh.place(devices, create(params(), optimizer, jax.random.key(0)))
    if form is mesh.pmap_step:
        call, put = mesh.pmap_step(update, jax.devices()[:n]), lambda batch: batch
    else:
        call, put = mesh.compile_step(form(update, devices), devices, state), mesh.put_batch(devices)
    for batch in batches():
        state, metrics = call(state, put(batch))
    return toy.host((state, metrics))


def without_key_biases(tree):
    """Softmax is blind to the keys' bias: its gradient is rounding and nothing else, which Adam blows up to a step."""

    def cut(path, leaf):
        return np.delete(leaf, 1, axis=0) if jax.tree_util.keystr(path).endswith("['qkv']['bias']") else leaf

    return jax.tree_util.tree_map_with_path(cut, tree)


@functools.cache
def alone():
    return train(1, by_jit)


@pytest.mark.long
@pytest.mark.parametrize(
    ("n", "form"),
    [
        (8, by_jit),
        (2, mesh.shard_map_step),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, by_jit), (4, by_jit), (8, mesh.pmap_step))),
    ],
)
def test_training_does_not_depend_on_the_devices(n, form):
    toy.assert_close(without_key_biases(train(n, form)), without_key_biases(alone()), 1e-5)


@functools.cache
def sampling():
    """(params, {"id", "label"} [B]) -> (images, x_T, the noise of every step), of the experiments' own sampler."""
    diffusion = model().diffusion
    grid = denoising.make_grid(diffusion, CONFIG.sample, CONFIG.diffusion.table_steps)

    @jax.jit
    def draw(params, part):
        denoise = denoising.make_denoiser(diffusion, model().apply, params)
        sampler = denoising.make_sampler(diffusion, CONFIG.sample, denoise, model().num_classes)

        def step(keys, state, t, s, cond):
            new, info = sampler.step(keys, state, t, s, cond)
            return new, info._replace(mean=normal(keys, state.x))

        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), part["id"])
        x = start(diffusion.process, keys, (len(keys), *model().shape), grid[0])
        shown = Sampler(sampler.init, step)
        made, noise = sample(shown, keys, x, grid, part["label"], trace=lambda x, info: info.mean)
        return made, x, jnp.moveaxis(noise, 0, 1)

    def run(ids, n):
        part = {"id": np.array(ids), "label": np.array(ids, np.int32) % 10}
        return jax.device_get(draw(params(), mesh.put_global(line(n), part)))

    return functools.cache(run)


@pytest.mark.parametrize(("ids", "n"), [((5,), 1), ((4, 5, 6, 7), 1), (tuple(range(8)), 2), (tuple(range(8)), 8)])
def test_a_sample_knows_neither_its_batch_nor_its_device(ids, n):
    """The noise is the same, the image to 1e-4, before any rounding to pixels.

    Random bits are bitwise the same; newer XLAs may round the inverse error function behind the normal numbers
    differently in its last place when another number of devices gives its loop another length.
    """
    whole, *noises = sampling()(tuple(range(8)), 1)
    assert np.mean(np.abs(whole) < 0.99) > 0.5  # clipping hides nothing
    few, *own = sampling()(ids, n)
    for noise, same in zip(noises, own, strict=True):
        np.testing.assert_array_max_ulp(same, noise[list(ids)], maxulp=2)
    np.testing.assert_allclose(few, whole[list(ids)], rtol=0, atol=1e-4)

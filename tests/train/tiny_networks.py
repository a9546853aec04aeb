"""The house's real networks, tiny, as training problems for the tests of meshes."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.nets.dit import DiT
from diffrl.nets.unet import UNet
from diffrl.train import mesh, optim
from diffrl.train.state import Aux, create
from diffrl.train.step import global_step, make_update

SIDE, SMALL, BATCH = 8, 100, 16
DIT = DiT(3, width=32, depth=3, heads=8, num_classes=4)
UNET = UNet(3, channels=8, multipliers=(1, 2), blocks=1, attention=(4,), groups=4, heads=2, num_classes=4)
# A large eps, so that Adam does not blow the rounding of a gradient that is 0 (of the keys' biases) up to a step.
OPTIM = optim.OptimConfig(learning_rate=1e-2, eps=1e-2)
OPTIMIZER = optim.make(OPTIM, 10)


def shapes(net, side=SIDE, channels=3):
    example = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    return jax.eval_shape(net.init, jax.random.key(0), *example)["params"]


@functools.cache
def params(net):
    """Random everywhere: the initialisers' zeros would let no gradient through."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan = max(leaf.size // leaf.shape[-1], 9) if leaf.ndim > 1 else 9
        return rng.normal(size=leaf.shape).astype(np.float32) / np.sqrt(fan, dtype=np.float32)

    return jax.tree.map(draw, shapes(net))


class Problem(NamedTuple):
    """A network under the objective of DDPM without its schedule, and one update of it."""

    net: Any
    side: int = SIDE
    channels: int = 3

    def loss(self, params, state, batch, keys):
        eps = jax.vmap(lambda key: jax.random.normal(key, batch["x"].shape[1:]))(keys)
        t = 1000 * jax.vmap(jax.random.uniform)(keys)
        guess = self.net.apply({"params": params}, batch["x"] + eps, t, batch["label"])
        return jnp.mean((guess[..., : self.channels] - eps) ** 2), Aux({})

    def step(self, **options):
        return global_step(make_update(self.loss, OPTIMIZER, **options))

    def fresh(self):
        """As it starts in earnest; for `mesh.initialise`."""
        example = jnp.zeros((1, self.side, self.side, self.channels)), jnp.zeros(1)
        key = jax.random.key(0)
        return create(self.net.init(key, *example)["params"], OPTIMIZER, key)

    def state(self, **options):
        return create(params(self.net), OPTIMIZER, jax.random.key(0), **options)

    def batch(self, i, size=BATCH):
        rng = np.random.default_rng(i)
        x = rng.normal(size=(size, self.side, self.side, self.channels)).astype(np.float32)
        return {"x": x, "label": rng.integers(4, size=size).astype(np.int32)}

    def compiled(self, devices, size=BATCH, small=SMALL, **options):
        """(the compiled step, the abstract state); nothing is computed."""
        like = mesh.abstract(devices, self.fresh, small)
        batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, self.batch(0, size)))
        call = mesh.compile_step(self.step(**options), devices, like, small=small)
        return call.lower(like, batch).compile(), like


def grid(data, fsdp, tensor):
    """A mesh of as many devices as it takes."""
    return mesh.make_mesh(data, fsdp, tensor, devices=jax.devices()[: data * fsdp * tensor])


def named(tree):
    """[(path between slashes, leaf), ...]"""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in jax.tree.leaves_with_path(tree)
    ]
